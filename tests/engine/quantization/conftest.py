"""Checkpoints in quantized formats, written by the formats' own libraries, and what an engine makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.attention.interface import AttentionMetadata
from engine.attention.reference import ReferenceAttention
from engine.memory import make_kv_spec
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.models.weights import load_weights
from engine.runner.model_runner import allocate_caches

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load(folder: Path, dtype: torch.dtype = torch.float64, **settings: Any) -> Decoder:
    decoder = Decoder(ModelConfig.from_folder(folder), dtype=dtype, device=CPU, max_positions=64, **settings)
    load_weights(decoder, folder)
    return decoder


@pytest.fixture(scope="session")
def load_decoder() -> Callable[..., Decoder]:
    """``load_decoder(folder, dtype, **settings of Decoder)``: a decoder with the folder's weights."""
    return load


def weights_of(folder: Path, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {name: target.clone() for name, target in load(folder, dtype).weight_targets()}


@pytest.fixture(scope="session")
def loaded_weights() -> Callable[..., dict[str, Tensor]]:
    """``loaded_weights(folder, dtype)``: every weight as our loader makes it, by its name in an unquantized checkpoint."""
    return weights_of


def logits_of(decoder: Decoder, tokens: list[int]) -> Tensor:
    length, dtype = len(tokens), decoder.embedding.dtype
    caches = allocate_caches(make_kv_spec(decoder.config, length, dtype), 1, dtype, CPU)
    meta = AttentionMetadata(
        query_start=torch.tensor([0, length], dtype=torch.int32),
        seq_lens=torch.tensor([length], dtype=torch.int32),
        block_tables=torch.zeros(1, 1, dtype=torch.int32),
        slot_mapping=torch.arange(length),
        max_query_len=length,
        max_seq_len=length,
        num_decode_rows=0,
    )
    with torch.inference_mode():
        hidden = decoder(torch.tensor(tokens), torch.arange(length), caches, meta, ReferenceAttention())
        return decoder.logits(hidden)


@pytest.fixture(scope="session")
def decoder_logits() -> Callable[[Decoder, list[int]], Tensor]:
    """``decoder_logits(decoder, tokens)``: its logits [n, V] of one row."""
    return logits_of
