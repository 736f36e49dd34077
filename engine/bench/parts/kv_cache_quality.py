"""What a quantized KV cache costs in quality: perplexity and KL divergence on given texts, against the unquantized one.

A text is one row: its tokens' keys and values go through the cache in every dtype that is asked for, by the attention that
an engine of this config has, and the next-token distributions are compared over the whole vocabulary. Weights are loaded once.

Boundary: token ids in, figures out. It builds no engine, takes no pool but one text's, and judges nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.attention.interface import AttentionBackend, AttentionMetadata
from engine.build import make_attention, prepare_decoder, resolve_config
from engine.config import EngineConfig
from engine.errors import InvalidRequestError
from engine.kernels.kv_quantization import cache_dtype
from engine.memory import make_kv_spec, torch_dtype
from engine.model_folder import find_model
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder, StepDecoder
from engine.models.quantized import quantize_decoder
from engine.models.weights import load_weights
from engine.runner.model_runner import PROMPT_LOGPROB_ROWS, allocate_caches

BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class KVCacheQuality:
    """Figures of one cache over all texts. A text's first token has nothing before it and is not scored."""

    kv_cache_dtype: str  # as in EngineConfig; "auto": the unquantized cache
    num_tokens: int
    perplexity: float
    mean_kl: float  # nats a token, of the unquantized cache's distribution from this one's; 0 for itself
    max_kl: float


def measure_kv_caches(
    config: EngineConfig, texts: Sequence[Sequence[int]], settings: Sequence[str] = ("int8", "fp8")
) -> list[KVCacheQuality]:
    """The unquantized cache's figures, then those of each of `settings`. The config's own cache does not count.

    Raises:
        InvalidRequestError: no text, or one of fewer than two tokens or beyond the model's context.
        EngineError: as ``engine.build.build_engine``.
    """
    longest = max(map(len, texts), default=0)
    if min(map(len, texts), default=0) < 2:
        raise InvalidRequestError("a text needs two tokens, of which the second is scored", param="texts")
    folder = find_model(config.model)
    model = ModelConfig.from_folder(folder)
    if longest > model.max_context:
        raise InvalidRequestError(
            f"a text of {longest} tokens is beyond the model's context of {model.max_context}",
            value=longest,
            limit=model.max_context,
            param="texts",
        )
    resolved = resolve_config(config, model)
    device, dtype = torch.device(resolved.device), torch_dtype(resolved)
    loaded = Decoder(model, dtype=dtype, device=device, max_positions=longest)
    load_weights(loaded, folder)
    if resolved.quantization is not None:
        quantize_decoder(loaded, resolved.quantization, deterministic=resolved.deterministic)
    decoder, attention = prepare_decoder(loaded, resolved), make_attention(resolved)
    dtypes = [cache_dtype(setting, dtype) for setting in ("auto", *settings)]
    found = []
    with torch.inference_mode():
        for text in texts:
            token_ids = torch.tensor(list(text), device=device)
            hidden = [_hidden(decoder, attention, token_ids, stored) for stored in dtypes]
            found.append(_compare(decoder, hidden, token_ids[1:]))
    logprobs, divergences = (torch.cat(parts, 1).cpu() for parts in zip(*found, strict=True))
    return [
        KVCacheQuality(setting, len(own), math.exp(-float(own.mean())), float(kl.mean()), float(kl.max()))
        for setting, own, kl in zip(("auto", *settings), logprobs, divergences, strict=True)
    ]


def _hidden(
    decoder: StepDecoder, attention: AttentionBackend, token_ids: Tensor, stored: torch.dtype
) -> Tensor:
    """Hidden states [n, hidden] of a text, over a cache of its own."""
    length, device = len(token_ids), token_ids.device
    num_blocks = -(-length // BLOCK_SIZE)
    positions = torch.arange(length, device=device)
    caches = allocate_caches(make_kv_spec(decoder.config, BLOCK_SIZE, stored), num_blocks, stored, device)
    meta = AttentionMetadata(
        query_start=torch.tensor([0, length], dtype=torch.int32, device=device),
        seq_lens=torch.tensor([length], dtype=torch.int32, device=device),
        block_tables=torch.arange(num_blocks, dtype=torch.int32, device=device)[None],
        slot_mapping=positions,
        max_query_len=length,
        max_seq_len=length,
        num_decode_rows=0,
    )
    return decoder.forward(token_ids, positions, caches, meta, attention)


def _compare(decoder: StepDecoder, hidden: list[Tensor], following: Tensor) -> tuple[Tensor, Tensor]:
    """Of each cache: log-probabilities of the tokens that follow, and divergences from the first's; both [caches, n - 1]."""
    logprobs, divergences = [], []
    for first in range(0, len(following), PROMPT_LOGPROB_ROWS):  # all rows' logits at once would be gigabytes
        rows = slice(first, min(first + PROMPT_LOGPROB_ROWS, len(following)))
        own = [decoder.logits(states[rows]).double().log_softmax(-1) for states in hidden]
        want = own[0]
        logprobs.append(torch.stack([each.gather(1, following[rows, None])[:, 0] for each in own]))
        divergences.append(torch.stack([(want.exp() * (want - each)).sum(-1) for each in own]))
    return torch.cat(logprobs, 1), torch.cat(divergences, 1)
