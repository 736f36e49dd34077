"""What batch-invariant mode costs: `serve-8b`'s requests with ``deterministic=True`` over the same without, and that it holds.

Batch-invariant products and attention have one fixed order of sums whatever shares the batch, so they cannot take the
fastest form for each size. Both engines run the same requests with a quarter of their output; then some of the requests run again
alone on the deterministic engine and must give the same tokens.
"""

from __future__ import annotations

import argparse
from typing import Any

from engine.bench.parts.random_engine import random_engine
from engine.bench.parts.report import Bar, print_table
from engine.bench.parts.session import Session, add_arguments, open_session
from engine.bench.parts.throughput import measure_engine, print_phases, warm_up
from engine.bench.parts.workload import Run, Workload, run_workload
from engine.bench.serve_8b import serve_workload

__all__ = ["add_arguments", "measure", "run"]

BAR = Bar("invariant, slow-down of batch-invariant mode", 0.25, 0.05, is_lower_better=True)
OUTPUT_SHARE = 4
NUM_ALONE, ALONE_TOKENS = 2, 64


def run(options: argparse.Namespace) -> dict[str, Any]:
    return measure(open_session(options), options)


def measure(session: Session, options: argparse.Namespace) -> dict[str, Any]:
    """Measure in an open session; prints tables, returns figures.

    Raises:
        AssertionError: a request's tokens depend on what shared the batch.
    """
    shape, whole = serve_workload(session.is_tiny)
    workload = whole.with_output(max(whole.output_tokens) // OUTPUT_SHARE)
    off = measure_engine(session, shape, workload).runs[0]
    limits: dict[str, Any] = {"max_num_seqs": len(workload.prompts), "max_model_len": workload.max_model_len}
    with random_engine(shape, session.device, deterministic=True, **limits) as engine:
        warm_up(engine, workload)
        on = run_workload(engine, workload, ends_at=session.ends_at)
        for i in range(NUM_ALONE):
            alone = Workload("alone", [workload.prompts[i]], [min(ALONE_TOKENS, workload.output_tokens[i])])
            tokens = run_workload(engine, alone, ends_at=session.ends_at).outputs[0]
            assert tokens == on.outputs[i][: len(tokens)], (
                f"request {i} alone gives other tokens than in the batch"
            )
    rows = [_row("off", off), _row("on", on)]
    print_table(f"batch-invariant mode, {shape.name}: {len(workload.prompts)} requests", rows)
    slow_down = on.seconds / off.seconds - 1.0
    return {
        **session.figures(), **workload.figures(), "shape": shape.name, "modes": rows, "slow_down": slow_down,
        "same_alone": NUM_ALONE, "verdicts": [BAR.judge(slow_down, is_tiny=session.is_tiny)],
        "phases": print_phases(session, on),
    }  # fmt: skip


def _row(mode: str, run: Run) -> dict[str, Any]:
    return {
        "deterministic": mode,
        "seconds": run.seconds,
        "output_tokens_s": run.num_output_tokens / run.seconds,
    }
