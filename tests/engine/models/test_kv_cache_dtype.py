"""Engines with a quantized KV cache: the same tokens as one float64 pass over rounded keys and values, however they got there."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.attention.interface import AttentionMetadata
from engine.attention.reference import ReferenceAttention
from engine.build import build_engine, resolve_config
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.kernels.kv_quantization import quantized_fp8, quantized_int8
from engine.memory import make_kv_spec
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.models.weights import load_weights
from engine.runner.model_runner import allocate_caches
from engine.sampling_params import SamplingParams

CPU = torch.device("cpu")
QUANTIZED = pytest.mark.parametrize("stored", ["int8", "fp8"])
GREEDY = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True, logprobs=0)


class Rounding(ReferenceAttention):
    """Attention over an unquantized cache, into which go what a quantized one would give back."""

    def __init__(self, stored: str) -> None:
        super().__init__()
        self.stored = stored

    def store_kv(self, k: Tensor, v: Tensor, *args: Any, **scales: Any) -> None:
        super().store_kv(self._rounded(k), self._rounded(v), *args, **scales)

    def _rounded(self, x: Tensor) -> Tensor:
        if self.stored == "fp8":
            return quantized_fp8(x, torch.ones(x.shape[1])).to(x.dtype)
        values, scale = quantized_int8(x)
        return values.to(x.dtype) * scale[..., None].to(x.dtype)


@torch.inference_mode()
def expected_logprobs(folder: Path, tokens: list[int], stored: str) -> Tensor:
    """Log-probabilities [n, V] of one float64 pass over a whole text."""
    model, length = ModelConfig.from_folder(folder), len(tokens)
    decoder = Decoder(model, dtype=torch.float64, device=CPU, max_positions=length)
    load_weights(decoder, folder)
    caches = allocate_caches(make_kv_spec(model, 256, torch.float64), 1, torch.float64, CPU)
    meta = AttentionMetadata(
        query_start=torch.tensor([0, length], dtype=torch.int32),
        seq_lens=torch.tensor([length], dtype=torch.int32),
        block_tables=torch.zeros(1, 1, dtype=torch.int32),
        slot_mapping=torch.arange(length),
        max_query_len=length,
        max_seq_len=length,
        num_decode_rows=0,
    )
    hidden = decoder(torch.tensor(tokens), torch.arange(length), caches, meta, Rounding(stored))
    return decoder.logits(hidden).log_softmax(-1)


def prompts_of(prompt_of: Callable[..., list[int]]) -> dict[str, list[int]]:
    """Two share a prefix of several blocks; the longest fills more than one step of 16 tokens."""
    shared = prompt_of(21)
    return {
        "first": [*shared, 3],
        "long": prompt_of(53, seed=1),
        "same": [*shared, 5, 7],
        "short": prompt_of(4, seed=2),
    }


CROWDED: dict[str, Any] = {"num_blocks": 26, "max_batched_tokens": 16}
ARRIVALS = {"first": 0, "long": 1, "short": 2, "same": 4}


@QUANTIZED
@pytest.mark.parametrize("family", ["qwen3_norm_window", "llama_linear_mqa"])
def test_chunks_hits_and_preemption_give_the_tokens_of_one_pass(
    stored: str,
    family: str,
    tiny_models: Callable[[str], Any],
    run_engine: Callable[..., Any],
    prompt_of: Callable[..., list[int]],
) -> None:
    folder, prompts = tiny_models(family).folder, prompts_of(prompt_of)
    run = run_engine(folder, prompts, GREEDY, arrive_at=ARRIVALS, kv_cache_dtype=stored, **CROWDED)
    assert run.preempted
    assert run.prefix_hits
    assert run.mixed_steps
    assert max(run.steps_of("long")) < 53, "its prompt was cut"
    plain = run_engine(folder, {"long": prompts["long"]}, GREEDY)
    for name, prompt in prompts.items():
        tokens = run.tokens[name]
        want = expected_logprobs(folder, [*prompt, *tokens], stored)[len(prompt) - 1 : -1]
        assert want.argmax(-1).tolist() == tokens, name
        figures = [entry.logprob for entry in run.logprobs[name]]
        # float64 in another order of summation; a stored value that this moved over the middle between two would show.
        assert figures == pytest.approx(want.amax(-1).tolist(), abs=1e-6), name
    differences = [
        abs(a.logprob - b.logprob) for a, b in zip(run.logprobs["long"], plain.logprobs["long"], strict=True)
    ]
    assert max(differences) > 1e-4, "the cache was not quantized"


@pytest.mark.parametrize(
    ("stored", "backend", "dtype"),
    [
        ("int8", "auto", "bfloat16"), ("fp8", "auto", "float32"),
        *(pytest.param(stored, "reference", "float32", marks=pytest.mark.full) for stored in ("int8", "fp8")),
    ],
)  # fmt: skip
def test_deterministic_mode_keeps_every_bit(
    stored: str,
    backend: str,
    dtype: str,
    tiny_models: Callable[[str], Any],
    run_engine: Callable[..., Any],
    prompt_of: Callable[..., list[int]],
) -> None:
    folder, prompts = tiny_models("llama3_gqa_tied").folder, prompts_of(prompt_of)
    settings = {
        "kv_cache_dtype": stored, "deterministic": True, "attention_backend": backend, "dtype": dtype,
    }  # fmt: skip
    together = run_engine(folder, prompts, GREEDY, arrive_at=ARRIVALS, **CROWDED, **settings)
    assert together.preempted
    assert together.prefix_hits
    for name, prompt in prompts.items():
        alone = run_engine(folder, {name: prompt}, GREEDY, **settings)
        assert together.tokens[name] == alone.tokens[name], name
        assert together.logprobs[name] == alone.logprobs[name], f"{name}: same tokens, other bits"


def config_of(folder: Path, **settings: Any) -> EngineConfig:
    return EngineConfig(model=str(folder), device="cpu", num_threads=1, dtype="float32", **settings)


def test_a_pool_of_the_same_bytes_holds_more_blocks(tiny_models: Callable[[str], Any]) -> None:
    folder = tiny_models("llama3_gqa_tied").folder
    blocks = {
        stored: resolve_config(config_of(folder, kv_cache_dtype=stored, kv_memory_bytes=1 << 20)).num_blocks
        for stored in ("auto", "int8", "fp8", "fp8_e4m3")
    }
    heads = 16 * 3 * 2 * 2  # 16 tokens, 3 layers, K and V, 2 heads of 12 values
    assert blocks == {
        "auto": (1 << 20) // (heads * 48), "int8": (1 << 20) // (heads * (12 + 4)), "fp8": (1 << 20) // (heads * 12),
        "fp8_e4m3": (1 << 20) // (heads * 12),
    }  # fmt: skip


def test_the_setting_has_one_name_for_each_kind_once_resolved(tiny_models: Callable[[str], Any]) -> None:
    folder = tiny_models("llama3_gqa_tied").folder
    resolved = {
        name: resolve_config(config_of(folder, kv_cache_dtype=name, num_blocks=8)).kv_cache_dtype
        for name in ("auto", "float32", "int8", "fp8", "fp8_e4m3")
    }
    assert resolved == {
        "auto": "float32",
        "float32": "float32",
        "int8": "int8",
        "fp8": "fp8",
        "fp8_e4m3": "fp8",
    }


def test_float32_that_nobody_asked_for_keeps_a_bfloat16_checkpoint_in_bfloat16(
    tiny_models: Callable[[str], Any], tmp_path: Path
) -> None:
    folder = tiny_models("llama3_gqa_tied").copy(tmp_path / "model")
    described = json.loads((folder / "config.json").read_text())
    asked = EngineConfig(model=str(folder), device="cpu", num_blocks=8)
    found = {}
    for checkpoint in ("bfloat16", "float32"):
        (folder / "config.json").write_text(json.dumps({**described, "dtype": checkpoint}))
        found[checkpoint] = resolve_config(asked)
    float32 = "bfloat16" if found["float32"].dtype == "bfloat16" else "float32"  # where the CPU multiplies it
    assert found["bfloat16"].kv_cache_dtype == "bfloat16"
    assert found["float32"].kv_cache_dtype == float32
    (folder / "config.json").write_text(json.dumps({**described, "dtype": "bfloat16"}))
    assert resolve_config(replace(asked, dtype="float32")).kv_cache_dtype == "float32"
    assert (
        resolve_config(replace(asked, dtype="float32", kv_cache_dtype="bfloat16")).kv_cache_dtype
        == "bfloat16"
    )


@pytest.mark.parametrize(("name", "accepted"), [("int4", "fp8_e4m3"), ("float16", "float32")])
def test_what_no_cache_holds_is_refused_before_weights_are_read(
    name: str, accepted: str, tiny_models: Callable[[str], Any], tmp_path: Path
) -> None:
    folder = tiny_models("llama3_gqa_tied").copy(tmp_path / "empty")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=f"kv_cache_dtype.*{name}") as caught:
        build_engine(config_of(folder, kv_cache_dtype=name))
    assert caught.value.param == "kv_cache_dtype"
    assert accepted in caught.value.limit
