"""One stream: 128 tokens in and 512 out at Llama-3.1-8B's shape, batch 1, in each precision of the weights that the engine has.

Every token reads all weights, so the floor is the time to stream them (and the few keys and values) at the bandwidth measured in
this run. Quantized matrices count with their own bits, the output head with 16; scales are left out of the floor of the whole
workload, which is worked out beforehand, and count in the phases, which are of the step records.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from engine.bench.parts.floors import ModelCost
from engine.bench.parts.peer_process import COMPILED, STATIC, VLLM
from engine.bench.parts.peers import add_arguments, measure_peers
from engine.bench.parts.report import Bar, print_table
from engine.bench.parts.session import Session, open_session
from engine.bench.parts.shapes import LLAMA_8B, TINY, Shape
from engine.bench.parts.throughput import measure_ablations, measure_engine, print_phases
from engine.bench.parts.workload import Workload, equal_requests
from engine.errors import ConfigError

__all__ = ["add_arguments", "measure", "run"]

ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Precision:
    """How the weights are held. `quantization`: as in EngineConfig; `bits` of a weight in the layers, None: as computed."""

    quantization: str | None
    bits: int | None
    passing: float
    target: float

    @property
    def name(self) -> str:
        return self.quantization or "unquantized"


PRECISIONS = (
    Precision(None, None, 0.80, 0.90),
    Precision("int8", 8, 0.65, 0.85),
    Precision("int4", 4, 0.55, 0.75),
)


def run(options: argparse.Namespace) -> dict[str, Any]:
    return measure(open_session(options), options)


def measure(session: Session, options: argparse.Namespace) -> dict[str, Any]:
    """Measure in an open session; prints tables, returns figures."""
    shape, workload = single_workload(session.is_tiny)
    figures: dict[str, Any] = {**session.figures(), **workload.figures(), "shape": shape.name, "verdicts": []}
    rows = []
    for precision in PRECISIONS:
        row, verdict, more = _measure_precision(session, shape, workload, precision)
        rows.append(row)
        figures["verdicts"] += verdict
        figures |= more
    figures["precisions"] = rows
    print_table(f"{shape.name}, one stream", rows)
    if not options.no_ablations:
        figures["ablations"] = measure_ablations(session, shape, workload, ("graphs off", "overlap off"))
    figures["peers"] = measure_peers(session, options, shape, workload, (STATIC, COMPILED, VLLM))
    return figures


def _measure_precision(
    session: Session, shape: Shape, workload: Workload, precision: Precision
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """Its row of the table, its verdict, and its phases; a row alone where the engine has it not."""
    cost = ModelCost(shape.model, session.dtype_bytes, precision.bits)
    floor = cost.workload(session.limits, workload.lengths)
    row: dict[str, Any] = {
        "weights": precision.name, "tokens_s": None, "floor_tokens_s": workload.num_output_tokens / floor.seconds,
        "of_floor": None, "note": "",
    }  # fmt: skip
    rounds = 1 if session.is_tiny else ROUNDS
    try:
        measured = measure_engine(
            session, shape, workload, rounds=rounds, quantization=precision.quantization
        )
    except ConfigError as error:
        return row | {"note": f"absent: {error}"}, [], {}
    share = floor.seconds / measured.seconds
    bar = Bar(f"single, {precision.name}, share of the floor", precision.passing, precision.target)
    verdict = bar.judge(share, is_tiny=session.is_tiny)
    row |= {"tokens_s": workload.num_output_tokens / measured.seconds, "of_floor": round(share, 4)}
    phases = "phases" if precision.quantization is None else f"phases_{precision.quantization}"
    return row, [verdict], {phases: print_phases(session, measured.runs[0])}


def single_workload(is_tiny: bool) -> tuple[Shape, Workload]:
    """The shape and its one request."""
    if is_tiny:
        return TINY, equal_requests("single", 1, 16, 12, TINY.model.vocab_size)
    return LLAMA_8B, equal_requests("single", 1, 128, 512, LLAMA_8B.model.vocab_size)
