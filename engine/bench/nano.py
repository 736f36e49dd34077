"""A small model with mixed lengths: 256 requests of 100 to 1024 tokens in and out, at Qwen3-0.6B's shape in bfloat16.

Steps are short, so what the host and the launches cost shows. The requests are those of nano-vllm's benchmark (seed 0,
133,966 output tokens, temperature 0.6); the floor prefills all of them and then decodes with every running sequence in each step.
"""

from __future__ import annotations

import argparse
from typing import Any

from engine.bench.parts.floors import ModelCost
from engine.bench.parts.peer_process import CONTINUOUS, STATIC, VLLM
from engine.bench.parts.peers import add_arguments, measure_peers
from engine.bench.parts.report import Bar
from engine.bench.parts.session import Session, open_session
from engine.bench.parts.shapes import QWEN3_600M, TINY, Shape
from engine.bench.parts.throughput import measure_ablations, measure_engine, print_phases
from engine.bench.parts.workload import Workload, mixed_requests

__all__ = ["add_arguments", "measure", "run"]

BAR = Bar("nano, share of the floor", 0.45, 0.70)
ROUNDS = 3


def run(options: argparse.Namespace) -> dict[str, Any]:
    return measure(open_session(options), options)


def measure(session: Session, options: argparse.Namespace) -> dict[str, Any]:
    """Measure in an open session; prints tables, returns figures."""
    shape, workload = nano_workload(session.is_tiny)
    cost = ModelCost(shape.model, session.dtype_bytes)
    floor = cost.workload(session.limits, workload.lengths)
    measured = measure_engine(session, shape, workload, rounds=1 if session.is_tiny else ROUNDS)
    share = floor.seconds / measured.seconds
    print(
        f"{shape.name}: {workload.num_output_tokens} output tokens in {measured.seconds:.2f} s, "
        f"{workload.num_output_tokens / measured.seconds:,.0f} tokens/s; "
        f"floor {floor.seconds:.2f} s, {workload.num_output_tokens / floor.seconds:,.0f} tokens/s"
    )
    figures = {
        **session.figures(), **workload.figures(), "shape": shape.name, **measured.figures(),
        "floor_s": floor.seconds, "floor_output_tokens_s": workload.num_output_tokens / floor.seconds,
        "verdicts": [BAR.judge(share, is_tiny=session.is_tiny)],
        "phases": print_phases(session, measured.runs[0]),
    }  # fmt: skip
    if not options.no_ablations:
        figures["ablations"] = measure_ablations(session, shape, workload)
    figures["peers"] = measure_peers(session, options, shape, workload, (STATIC, CONTINUOUS, VLLM))
    return figures


def nano_workload(is_tiny: bool) -> tuple[Shape, Workload]:
    """The shape and its requests."""
    if is_tiny:
        return TINY, mixed_requests(6, 4, 24, TINY.model.vocab_size - 1)
    return QWEN3_600M, mixed_requests(256, 100, 1024, 10_000)
