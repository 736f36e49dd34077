"""Serving an 8B model: 256 requests of 1024 tokens in and 1024 out that all arrive at once, at Qwen3-8B's shape in bfloat16.

Long batches at full width: prefill multiplies; decode reads the weights once a step and every sequence's keys and values, which
outweigh the weights from the first step. The floor adds the three, with the rates measured in this run. The same requests are
then served with an fp8 KV cache, against the floor that this has.

Ablations take a quarter of the input and an eighth of the output, the engine as it is included.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from engine.bench.parts.floors import ModelCost
from engine.bench.parts.peer_process import CONTINUOUS, STATIC, VLLM
from engine.bench.parts.peers import add_arguments, measure_peers
from engine.bench.parts.report import Bar
from engine.bench.parts.session import Session, open_session
from engine.bench.parts.shapes import QWEN3_8B, TINY, Shape
from engine.bench.parts.throughput import measure_ablations, measure_engine, print_phases
from engine.bench.parts.workload import Workload, equal_requests

__all__ = ["add_arguments", "measure", "run"]

BAR = Bar("serve-8b, share of the floor", 0.65, 0.85)
FP8_BAR = Bar("serve-8b with an fp8 KV cache, share of its floor", 0.65, 0.85)


def run(options: argparse.Namespace) -> dict[str, Any]:
    return measure(open_session(options), options)


def measure(session: Session, options: argparse.Namespace) -> dict[str, Any]:
    """Measure in an open session; prints tables, returns figures."""
    shape, workload = serve_workload(session.is_tiny)
    cost = ModelCost(shape.model, session.dtype_bytes)
    floor = cost.workload(session.limits, workload.lengths)
    measured = measure_engine(session, shape, workload)
    share = floor.seconds / measured.seconds
    print(
        f"{shape.name}: {len(workload.prompts)} requests in {measured.seconds:.2f} s; floor {floor.seconds:.2f} s "
        f"(prefill {floor.prefill_s:.2f}, decode {floor.decode_s:.2f})"
    )
    figures = {
        **session.figures(), **workload.figures(), "shape": shape.name, **measured.figures(),
        "floor_s": floor.seconds, "floor_prefill_s": floor.prefill_s, "floor_decode_s": floor.decode_s,
        "verdicts": [BAR.judge(share, is_tiny=session.is_tiny)],
        "phases": print_phases(session, measured.runs[0]),
    }  # fmt: skip
    if session.has_room("fp8 KV cache", 1.5 * measured.seconds + measured.start_s):
        figures["fp8_kv"], verdict = _with_fp8_cache(session, shape, workload)
        figures["verdicts"].append(verdict)
    if not options.no_ablations:
        figures["ablations"] = measure_ablations(session, shape, shorter(workload))
    figures["peers"] = measure_peers(session, options, shape, workload, (STATIC, CONTINUOUS, VLLM))
    return figures


def _with_fp8_cache(
    session: Session, shape: Shape, workload: Workload
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures of the same requests with an fp8 KV cache, and their verdict."""
    floor = ModelCost(shape.model, session.dtype_bytes, kv_dtype_bytes=1).workload(
        session.limits, workload.lengths
    )
    measured = measure_engine(session, shape, workload, kv_cache_dtype="fp8")
    print(f"with an fp8 KV cache: {measured.seconds:.2f} s; floor {floor.seconds:.2f} s")
    verdict = FP8_BAR.judge(floor.seconds / measured.seconds, is_tiny=session.is_tiny)
    return {**measured.figures(), "floor_s": floor.seconds}, verdict


def serve_workload(is_tiny: bool) -> tuple[Shape, Workload]:
    """The shape and its requests."""
    if is_tiny:
        return TINY, equal_requests("serve-8b", 4, 24, 16, TINY.model.vocab_size)
    return QWEN3_8B, equal_requests("serve-8b", 256, 1024, 1024, QWEN3_8B.model.vocab_size)


def shorter(workload: Workload) -> Workload:
    """The requests of the ablations."""
    prompts = [prompt[: len(prompt) // 4] for prompt in workload.prompts]
    return replace(workload, prompts=prompts).with_output(max(workload.output_tokens) // 8)
