"""The whole engine on the Triton kernels of attention and layers: real step metadata, chunks, mixed steps, prefix hits and preemption."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from engine.attention.interface import AttentionBackend
from engine.attention.reference import ReferenceAttention
from engine.attention.triton_paged import TritonPagedAttention
from engine.config import EngineConfig
from engine.engine import Engine
from engine.kernels.kv_quantization import cache_dtype
from engine.memory import make_kv_spec
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.records import StepRecord
from engine.runner.model_runner import ModelRunner
from engine.sampling_params import SamplingParams

VOCAB = 64
SHAPE = {
    "architectures": [
        "Qwen3ForCausalLM"
    ],  # has all that layers can have: query-key norms, and windows in some
    "model_type": "qwen3",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "use_sliding_window": True,
    "sliding_window": 24,
    "layer_types": ["sliding_attention", "full_attention"],
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}


@dataclass
class Ran:
    tokens: dict[str, list[int]] = field(default_factory=dict)
    logprobs: dict[str, list[float]] = field(default_factory=dict)
    records: list[StepRecord] = field(default_factory=list)


def _engine(attention: AttentionBackend, stored: str) -> Engine:
    model = ModelConfig.from_dict(SHAPE)
    config = EngineConfig(
        model="random", dtype="float32", device="cpu", block_size=16, num_blocks=8, max_batched_tokens=32,
        max_num_seqs=4, max_model_len=120, num_threads=1, deterministic=False, kv_cache_dtype=stored,
    )  # fmt: skip
    assert config.max_model_len is not None
    device, dtype = torch.device("cpu"), torch.float32
    decoder = Decoder(model, dtype=dtype, device=device, max_positions=config.max_model_len)
    generator = torch.Generator().manual_seed(5)
    for parameter in decoder.parameters():
        spread = 1.0 if parameter.shape[0] == VOCAB else 1.5 * parameter.shape[-1] ** -0.5
        parameter.normal_(
            0.0 if parameter.ndim > 1 else 1.0, spread if parameter.ndim > 1 else 0.2, generator=generator
        )
    if attention.name == "triton":
        decoder.use_kernels()
    kv_spec = make_kv_spec(model, config.block_size, cache_dtype(stored, dtype))
    runner = ModelRunner(
        decoder,
        attention,
        config=config,
        kv_spec=kv_spec,
        eos_token_ids=frozenset(),
        device=device,
        dtype=dtype,
    )
    return Engine(config, runner, kv_spec=kv_spec, eos_token_ids=frozenset(), vocab_size=VOCAB)


def _run(attention: AttentionBackend, stored: str) -> Ran:
    """Two prompts share three blocks; together they need more blocks than there are; chunks are of 32 tokens."""
    generator = torch.Generator().manual_seed(1)
    shared = torch.randint(0, VOCAB, (58,), generator=generator).tolist()  # near the end of a block
    prompts = {"a": [*shared, 1, 2], "b": [*shared[::-1], 3], "c": [*shared, 4, 5, 6]}
    engine, ran = _engine(attention, stored), Ran()
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=0)
    waiting, step = dict(prompts), 0
    while waiting or engine.has_work:
        for name in [n for n in waiting if {"a": 0, "b": 2, "c": 5}[n] <= step]:
            engine.add(engine.make_request(tuple(waiting.pop(name)), params, request_id=name))
        output, step = engine.step(), step + 1
        for delta in output.deltas:
            assert delta.error is None, delta.error
            ran.tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
            ran.logprobs.setdefault(delta.request_id, []).extend(entry.logprob for entry in delta.logprobs)
        if output.record is not None:
            ran.records.append(output.record)
    engine.check_integrity()
    engine.close()
    return ran


def test_the_engine_generates_the_same_on_the_triton_kernels_and_on_the_reference() -> None:
    check_same("auto")


def check_same(stored: str) -> None:
    """With a KV cache of that setting."""
    got, want = _run(TritonPagedAttention(), stored), _run(ReferenceAttention(), stored)
    assert any(r.num_prefill_tokens and r.num_decode_tokens for r in got.records), "no mixed step"
    assert any(hits for record in got.records for _, hits in record.prefix_hits), "no prefix hit"
    assert any(record.preempted for record in got.records), "no preemption"
    assert max(n for record in got.records for _, n in record.rows) == 32, "no chunk"
    assert got.tokens == want.tokens
    for name, figures in want.logprobs.items():
        assert got.logprobs[name] == pytest.approx(figures, abs=1e-4)
