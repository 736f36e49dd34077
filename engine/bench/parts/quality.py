"""What quantized weights and quantized KV caches cost in quality: perplexity and KL divergence on given texts, against the original.

A text is one row: its tokens' keys and values go through a cache of the dtype that is asked for, by the attention that an
engine of this config has, and the next-token distributions are compared over the whole vocabulary. The original's weights
stay loaded; each other way to hold them is loaded beside it once.

Boundary: token ids in, figures out. It builds no engine, takes no pool but one text's, and judges nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

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
from engine.models.quantized import held_forms, quantize_decoder, set_deterministic
from engine.models.weights import load_weights
from engine.runner.model_runner import PROMPT_LOGPROB_ROWS, allocate_caches

BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to hold weights and cache. `model`: a folder of the same model in another form; None: the original's."""

    quantization: str | None = None  # as in EngineConfig
    kv_cache_dtype: str = "auto"  # as in EngineConfig; "auto": the unquantized cache
    model: str | None = None


@dataclass(frozen=True, slots=True)
class Quality:
    """Figures of one variant over all texts. A text's first token has nothing before it and is not scored."""

    variant: Variant
    num_tokens: int
    perplexity: float
    mean_kl: float  # nats a token, of the original's distribution from this one's; 0 for itself
    max_kl: float
    same_top: float  # share of tokens after which both find the same token most likely


def measure_kv_caches(
    config: EngineConfig, texts: Sequence[Sequence[int]], settings: Sequence[str] = ("int8", "fp8")
) -> list[Quality]:
    """The unquantized cache's figures, then those of each of `settings`. The config's own cache does not count.

    Raises:
        As `measure_variants`.
    """
    return measure_variants(config, texts, [Variant(config.quantization, setting) for setting in settings])


def measure_variants(
    config: EngineConfig, texts: Sequence[Sequence[int]], variants: Sequence[Variant]
) -> list[Quality]:
    """Figures of the config's own weights with an unquantized cache, then of each variant against that.

    Raises:
        InvalidRequestError: no text, or one of fewer than two tokens or beyond the model's context.
        EngineError: as ``engine.build.build_engine``.
    """
    model = ModelConfig.from_folder(find_model(config.model))
    _check_texts(texts, model)
    original = Variant(config.quantization)
    own = _Weights(config, original, texts)
    wanted, found = own.hidden("auto"), []
    for variant in (original, *variants):
        shared = (variant.quantization, variant.model) == (original.quantization, None)
        weights = own if shared else _Weights(config, variant, texts)
        found.append(_compare(variant, own, wanted, weights))
    return found


def _check_texts(texts: Sequence[Sequence[int]], model: ModelConfig) -> None:
    longest = max(map(len, texts), default=0)
    if min(map(len, texts), default=0) < 2:
        raise InvalidRequestError("a text needs two tokens, of which the second is scored", param="texts")
    if longest > model.max_context:
        raise InvalidRequestError(
            f"a text of {longest} tokens is beyond the model's context of {model.max_context}",
            value=longest,
            limit=model.max_context,
            param="texts",
        )


class _Weights:
    """A model loaded in one form, and what it makes of the texts."""

    def __init__(self, config: EngineConfig, variant: Variant, texts: Sequence[Sequence[int]]) -> None:
        asked = replace(config, quantization=variant.quantization, model=variant.model or config.model)
        folder = find_model(asked.model)
        model = ModelConfig.from_folder(folder)
        resolved = resolve_config(asked, model)
        device, self.dtype = torch.device(resolved.device), torch_dtype(resolved)
        loaded = Decoder(
            model, dtype=self.dtype, device=device, max_positions=max(map(len, texts)),
            held_forms=held_forms(model, dtype=self.dtype, device=device, deterministic=resolved.deterministic),
        )  # fmt: skip
        load_weights(loaded, Path(folder))
        set_deterministic(loaded, resolved.deterministic)
        if resolved.quantization is not None:
            quantize_decoder(loaded, resolved.quantization, deterministic=resolved.deterministic)
        self.decoder, self._attention = prepare_decoder(loaded, resolved), make_attention(resolved)
        self.texts = [torch.tensor(list(text), device=device) for text in texts]

    def hidden(self, kv_cache_dtype: str) -> list[Tensor]:
        """Hidden states [n, hidden] of each text, through a cache of this dtype."""
        stored = cache_dtype(kv_cache_dtype, self.dtype)
        with torch.inference_mode():
            return [_hidden(self.decoder, self._attention, text, stored) for text in self.texts]


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


def _compare(variant: Variant, own: _Weights, wanted: list[Tensor], weights: _Weights) -> Quality:
    """One variant's figures. `wanted`: the original's hidden states."""
    logprobs, divergences, same = [], [], []
    with torch.inference_mode():
        for text, want, states in zip(own.texts, wanted, weights.hidden(variant.kv_cache_dtype), strict=True):
            following = text[1:]
            for first in range(0, len(following), PROMPT_LOGPROB_ROWS):  # all rows' logits would be gigabytes
                rows = slice(first, min(first + PROMPT_LOGPROB_ROWS, len(following)))
                # One after the other: a decoder may give each call the same memory.
                p = own.decoder.logits(want[rows]).double().log_softmax(-1)
                q = weights.decoder.logits(states[rows]).double().log_softmax(-1)
                logprobs.append(q.gather(1, following[rows, None])[:, 0])
                divergences.append((p.exp() * (p - q)).sum(-1))
                same.append(p.argmax(-1) == q.argmax(-1))
    found, kl, equal = torch.cat(logprobs), torch.cat(divergences), torch.cat(same)
    return Quality(
        variant, len(found), math.exp(-float(found.mean())), float(kl.mean()), float(kl.max()),
        float(equal.double().mean()),
    )  # fmt: skip
