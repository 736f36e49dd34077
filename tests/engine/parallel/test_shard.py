"""The parts of a model that ranks hold make the whole model again: every family, in threads that sum with each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig

from engine.attention.interface import AttentionMetadata
from engine.attention.reference import ReferenceAttention
from engine.errors import ConfigError, CorruptWeightsError
from engine.memory import make_kv_spec
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.models.shard import Shard, shard_of
from engine.models.weights import load_weights
from engine.quantization.checkpoint import CheckpointQuantization
from engine.runner.model_runner import allocate_caches
from tests.engine.models.native_configs import NATIVE
from tests.engine.models.test_baichuan import write as write_baichuan

CPU, LENGTH, BLOCK = torch.device("cpu"), 40, 8  # beyond the windows of 20
# Sums of a few hundred float64 values in another order; a wrong part moves a logit by more than 0.1.
EXACT = 1e-9


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As in the other tests of models: ranks are threads here, and gain nothing from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model_of(config: PretrainedConfig) -> ModelConfig:
    name = type(config).__name__.removesuffix("Config").removesuffix("Text")
    return ModelConfig.from_dict({**config.to_dict(), "architectures": [f"{name}ForCausalLM"]})


def write(model: ModelConfig, folder: Path) -> None:
    """A checkpoint of random weights."""
    whole = Decoder(model, dtype=torch.float64, device=CPU, max_positions=LENGTH)
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for name, target in whole.weight_targets():
        values = torch.randn(target.shape, generator=generator, dtype=torch.float64)
        weights[name] = 1 + 0.3 * values if target.ndim == 1 else 1.5 * values / target.shape[-1] ** 0.5
    save_file(weights, folder / "model.safetensors")


def logits_of(decoder: Decoder, model: ModelConfig) -> Tensor:
    """Logits of one text, prefilled at once."""
    num_blocks = LENGTH // BLOCK
    spec = make_kv_spec(model, BLOCK, torch.float64)
    caches = allocate_caches(spec, num_blocks, torch.float64, CPU)
    meta = AttentionMetadata(
        query_start=torch.tensor([0, LENGTH], dtype=torch.int32), seq_lens=torch.tensor([LENGTH], dtype=torch.int32),
        block_tables=torch.arange(num_blocks, dtype=torch.int32)[None], slot_mapping=torch.arange(LENGTH),
        max_query_len=LENGTH, max_seq_len=LENGTH, num_decode_rows=0,
    )  # fmt: skip
    tokens = torch.arange(LENGTH) * 7 % 97
    with torch.inference_mode():
        hidden = decoder(tokens, torch.arange(LENGTH), caches, meta, ReferenceAttention())
        return decoder.logits(hidden)


def load(model: ModelConfig, folder: Path, shard: Shard | None = None) -> Decoder:
    decoder = Decoder(model, dtype=torch.float64, device=CPU, max_positions=LENGTH, shard=shard)
    load_weights(decoder, folder)
    return decoder


def all_reduces(size: int) -> Callable[[int], Callable[[Tensor], Tensor]]:
    """Sums over so many threads, by rank."""
    barrier, parts = Barrier(size, timeout=20), [torch.empty(0)] * size

    def of(rank: int) -> Callable[[Tensor], Tensor]:
        def all_reduce(x: Tensor) -> Tensor:
            parts[rank] = x
            barrier.wait()
            total = torch.stack(parts).sum(0)
            barrier.wait()
            return x.copy_(total)

        return all_reduce

    return of


def check(model: ModelConfig, folder: Path, size: int) -> None:
    whole = logits_of(load(model, folder), model)
    sums = all_reduces(size)

    def run(rank: int) -> Tensor:
        shard = shard_of(model, rank, size)
        decoder = load(shard.share, folder, shard)
        decoder.sum_over(sums(rank))
        return logits_of(decoder, shard.share)

    with ThreadPoolExecutor(size) as threads:
        first, *_ = threads.map(run, range(size))
    assert (first - whole).abs().max() < EXACT


# One of each kind of block; of four ranks, two hold each head of K and V.
SHORT = [("qwen2", 4), ("phi3", 4), ("qwen2-moe", 2), ("gpt-neox", 2), ("gemma2", 2)]
LONG = [(name, 2) for name in NATIVE if not name.startswith(("phi3-longrope", "gemma3-multimodal"))]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *SHORT,
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in [*LONG, ("mixtral", 4)]
            if case not in SHORT
        ),
    ],
)
def test_the_parts_of_a_family_make_the_whole(name: str, size: int, tmp_path: Path) -> None:
    model = model_of(NATIVE[name].config())
    write(model, tmp_path)
    check(model, tmp_path, size)


def test_slopes_and_a_normalized_head_belong_to_the_parts_that_have_them(tmp_path: Path) -> None:
    config, _ = write_baichuan("baichuan-13b", tmp_path)
    check(replace(ModelConfig.from_dict(config), has_normalized_head=True), tmp_path, 2)


def test_a_share_says_what_a_rank_holds(tmp_path: Path) -> None:
    model = replace(model_of(NATIVE["qwen2"].config()), tie_embeddings=False)
    for rank in range(2):
        share = shard_of(model, rank, 2).share
        decoder = Decoder(share, dtype=torch.float64, device=CPU, max_positions=1)
        held = sum(parameter.numel() for parameter in decoder.parameters())
        assert share.num_parameters == held
    assert make_kv_spec(share, 4, torch.float64).bytes_per_token * 2 == (
        make_kv_spec(model, 4, torch.float64).bytes_per_token
    )


def test_a_checkpoint_of_another_shape_is_refused_though_a_part_would_fit(tmp_path: Path) -> None:
    model = model_of(NATIVE["llama"].config())
    write(replace(model, intermediate_size=2 * model.intermediate_size), tmp_path)
    shard = shard_of(model, 0, 2)
    with pytest.raises(CorruptWeightsError, match=r"\(48, 160\), config.json asks for \(48, 80\)"):
        load(shard.share, tmp_path, shard)


@pytest.mark.parametrize(
    ("changes", "size", "what"),
    [
        ({}, 3, "num_attention_heads 4 is not a multiple"),
        ({"num_heads": 12, "num_kv_heads": 3}, 2, "num_key_value_heads 3 is neither"),
        ({"intermediate_size": 81}, 2, "intermediate_size 81 is not a multiple"),
        ({"quantization": CheckpointQuantization(method="awq", groups=())}, 2, "quantized weights"),
    ],
)
def test_what_cannot_be_split_is_refused_by_name(changes: dict[str, object], size: int, what: str) -> None:
    model = replace(model_of(NATIVE["llama"].config()), **changes)
    with pytest.raises(ConfigError, match=what) as raised:
        shard_of(model, 0, size)
    assert raised.value.param == "tensor_parallel_size"
    assert raised.value.value == size
