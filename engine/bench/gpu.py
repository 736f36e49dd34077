"""What `make bench-gpu` measures: attention kernels, then the engine at a published model's shape, against the limit.

Llama-3.1-8B's shape with random weights in bfloat16 where it fits, else Qwen3-0.6B's. Each run gives the time that the
device's measured limits would allow (per step: weights and keys read once, or operations, whichever takes longer), as a
share of the time that passed. Nothing is captured into graphs yet, so launches count. At most 8 minutes.

Without a GPU it refuses with exit code 2.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch

from engine.bench.attention import (
    Limits,
    check_results,
    make_pool,
    measure_decode,
    measure_limits,
    measure_prefill,
)
from engine.build import make_attention, prepare_decoder, resolve_config, torch_dtype
from engine.config import EngineConfig
from engine.engine import Engine
from engine.memory import make_kv_spec, make_ledger
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.records import StepRecord
from engine.runner.model_runner import ModelRunner
from engine.sampling_params import SamplingParams

BUDGET_SECONDS = 8 * 60
LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "hidden_act": "silu", "rope_theta": 500000.0,
}  # fmt: skip
QWEN3_600M: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024,
    "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
    "head_dim": 128, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    "hidden_act": "silu", "rope_theta": 1000000.0,
}  # fmt: skip
LLAMA_8B_BYTES = 40 << 30  # weights, and keys of the runs below


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests that all arrive at once, of random tokens, greedy, end-of-sequence ignored."""

    name: str
    requests: int
    input_tokens: int
    output_tokens: int


WORKLOADS = (
    Workload("single", 1, 128, 512),
    Workload("batch 64", 64, 512, 128),
    Workload("batch 256", 256, 512, 128),
    Workload("prefill 8 x 8k", 8, 8192, 1),
    Workload("prefill 1 x 32k", 1, 32768, 1),
)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure; leaves the program with code 2 where there is no GPU."""
    if not torch.cuda.is_available():
        print(
            "bench gpu needs a CUDA device and torch sees none here. Without one, `python -m engine.bench attention` checks "
            "the kernels in Triton's interpreter and `python -m engine.bench cpu` measures this machine.",
            file=sys.stderr,
        )
        raise SystemExit(2)
    began = time.monotonic()
    device = torch.device("cuda", torch.cuda.current_device())
    limits = measure_limits(device)
    print(f"{torch.cuda.get_device_name(device)}: {limits}")
    figures: dict[str, Any] = {"bandwidth_bytes_s": limits.bytes_s, "matrix_flops_s": limits.flops_s}
    figures["correctness"] = check_results(device, deterministic=False)
    pool = make_pool(device)
    figures["decode_attention"] = measure_decode(pool, limits)
    figures["prefill_attention"] = measure_prefill(pool, limits)
    del pool
    _free()
    figures.update(_measure_engine(limits, device, began))
    figures["seconds"] = round(time.monotonic() - began, 1)
    return figures


def _measure_engine(limits: Limits, device: torch.device, began: float) -> dict[str, Any]:
    free, _ = torch.cuda.mem_get_info(device)
    name, shape = ("Llama-3.1-8B", LLAMA_8B) if free >= LLAMA_8B_BYTES else ("Qwen3-0.6B", QWEN3_600M)
    before = torch.cuda.memory_allocated(device)
    engine = random_engine(shape, device)
    print(f"{name}'s shape, random weights, bfloat16, attention: {engine.config.attention_backend}")
    print(f"{'workload':>16} {'seconds':>8} {'tokens/s in':>12} {'out':>9} {'of limit':>9} {'ms a step':>12}")
    runs = []
    try:
        for length in (
            64,
            600,
        ):  # contexts of one split and of more: kernels are compiled at their first launch
            _run_workload(engine, Workload("warm-up", 4, length, 4))
        for workload in WORKLOADS:
            if time.monotonic() - began > BUDGET_SECONDS * 0.8:
                print(f"{workload.name:>16} left out: {BUDGET_SECONDS} s are nearly used up")
                continue
            runs.append(_measure_workload(engine, workload, limits))
    finally:
        engine.close()
        del engine
        _free()
    return {
        "model": name,
        "runs": runs,
        "bytes_left_after_close": torch.cuda.memory_allocated(device) - before,
    }


def random_engine(shape: dict[str, Any], device: torch.device) -> Engine:
    """An engine of this shape with random weights: as `engine.build.build_engine`, but without files."""
    model = ModelConfig.from_dict(shape)
    config = EngineConfig(
        model="random", dtype="bfloat16", device=str(device), max_num_seqs=256, max_model_len=33024,
        enable_prefix_cache=False,
    )  # fmt: skip
    config = resolve_config(config, model)
    assert config.max_model_len is not None
    dtype = torch_dtype(config)
    decoder = Decoder(model, dtype=dtype, device=device, max_positions=config.max_model_len)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in decoder.parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
    kv_spec = make_kv_spec(model, config.block_size, dtype)
    runner = ModelRunner(
        prepare_decoder(decoder, config), make_attention(config), config=config, kv_spec=kv_spec,
        eos_token_ids=frozenset(), device=device, dtype=dtype,
    )  # fmt: skip
    return Engine(
        config, runner, kv_spec=kv_spec, eos_token_ids=frozenset(), vocab_size=model.vocab_size,
        memory=make_ledger(config, model, kv_spec, dtype, device),
    )  # fmt: skip


def _run_workload(engine: Engine, workload: Workload) -> tuple[float, list[StepRecord]]:
    """Seconds from the first step to the last, and the step records."""
    generator = torch.Generator().manual_seed(workload.requests)
    params = SamplingParams(max_tokens=workload.output_tokens, temperature=0.0, ignore_eos=True)
    for _ in range(workload.requests):
        prompt = torch.randint(0, 32000, (workload.input_tokens,), generator=generator).tolist()
        engine.add(engine.make_request(tuple(prompt), params))
    records: list[StepRecord] = []
    began = time.perf_counter()
    while engine.has_work:
        output = engine.step()
        for delta in output.deltas:
            assert delta.error is None, delta.error
        if output.record is not None:
            assert output.record.error is None, output.record.error
            records.append(output.record)
    return time.perf_counter() - began, records


def _measure_workload(engine: Engine, workload: Workload, limits: Limits) -> dict[str, Any]:
    seconds, records = _run_workload(engine, workload)
    least = sum(limits.seconds(record.bytes_needed, record.flops_needed) for record in records)
    tokens_in = workload.requests * workload.input_tokens / seconds
    tokens_out = workload.requests * workload.output_tokens / seconds
    share = least / seconds
    print(
        f"{workload.name:>16} {seconds:8.2f} {tokens_in:12.0f} {tokens_out:9.0f} {share:8.0%} {1e3 * seconds / len(records):10.2f}"
    )
    return {
        "workload": workload.name, "requests": workload.requests, "input_tokens": workload.input_tokens,
        "output_tokens": workload.output_tokens, "seconds": seconds, "input_tokens_s": tokens_in,
        "output_tokens_s": tokens_out, "share_of_limit": round(share, 4), "steps": len(records),
    }  # fmt: skip


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()
