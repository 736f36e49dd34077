"""Adapters: 64 requests of 8 LoRA adapters in one batch over the same requests on the base, at Qwen3-8B's shape in bfloat16.

Two products of rank 16 are added to each linear layer: at this shape under 1 % of a step's operations, whatever the number of
adapters. What they cost beyond that is launches, and tokens of many adapters in one of them. The base runs on an engine of
its own, without slots, before and after; no engine has a prefix cache.

A swap is an adapter that is loaded from host memory and takes over a slot: seconds until the first token of a short prompt,
less those of the same prompt once it is there.

Ablations, on the engine with slots: no request uses an adapter (what the slots themselves cost), all use one and the same.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from engine.bench.parts.random_engine import random_engine
from engine.bench.parts.report import Bar, print_table
from engine.bench.parts.session import Session, add_arguments, open_session
from engine.bench.parts.shapes import QWEN3_8B, TINY, Shape
from engine.bench.parts.throughput import measure_engine, print_phases, warm_up
from engine.bench.parts.workload import Run, Workload, equal_requests, run_workload
from engine.engine import Engine
from engine.models.lora import AdapterWeights, SlotLayout, scale_dtype

__all__ = ["add_arguments", "measure", "run"]

BAR = Bar("adapters, throughput of 8 adapters over the base's", 0.75, 0.90)
NUM_ADAPTERS, RANK = 8, 16
NUM_SWAPS = 5
NONE, ONE, ALL = "slots, no adapter", "one adapter", f"{NUM_ADAPTERS} adapters"
SWAP_BAR = Bar("adapters, seconds of a swap", 0.200, 0.050, is_lower_better=True, percent=False)
PLAIN: dict[str, Any] = {"enable_prefix_cache": False}


@dataclass(frozen=True, slots=True)
class Load:
    """What runs, and on which model."""

    shape: Shape
    workload: Workload
    rounds: int


def run(options: argparse.Namespace) -> dict[str, Any]:
    return measure(open_session(options), options)


def measure(session: Session, options: argparse.Namespace) -> dict[str, Any]:
    """Measure in an open session; prints tables, returns figures.

    Raises:
        AssertionError: a request with an adapter gave the base's tokens.
    """
    load = _load(session.is_tiny)
    base = measure_engine(session, load.shape, load.workload, rounds=load.rounds, **PLAIN)
    variants = [ALL] if options.no_ablations else [ALL, NONE, ONE]
    runs, swap_s = _measure_variants(session, load, variants)
    _check_outputs(base.runs[0], runs[ALL][0])
    bases = list(base.runs)
    if session.has_room("the base again", base.start_s + 2 * base.seconds):
        bases += measure_engine(session, load.shape, load.workload, **PLAIN).runs
    rows = [_row("base", bases, bases), *(_row(name, found, bases) for name, found in runs.items())]
    print_table(f"{load.shape.name}: {len(load.workload.prompts)} requests, rank {RANK}", rows)
    share = rows[1]["share"]
    return {
        **session.figures(), **load.workload.figures(), "shape": load.shape.name, "rank": RANK, "adapters": NUM_ADAPTERS,
        "variants": rows, "share": share, "swap_s": swap_s,
        "verdicts": [BAR.judge(share, is_tiny=session.is_tiny), SWAP_BAR.judge(swap_s, is_tiny=session.is_tiny)],
        "phases": print_phases(session, runs[ALL][0]),
    }  # fmt: skip


def _load(is_tiny: bool) -> Load:
    if is_tiny:
        return Load(TINY, equal_requests("adapters", NUM_ADAPTERS, 12, 6, TINY.model.vocab_size), 1)
    return Load(QWEN3_8B, equal_requests("adapters", 64, 1024, 256, QWEN3_8B.model.vocab_size), 2)


def _measure_variants(session: Session, load: Load, names: list[str]) -> tuple[dict[str, list[Run]], float]:
    """The rounds of each variant on one engine with slots, in turn; and the seconds of a swap."""
    workload = load.workload
    limits: dict[str, Any] = {"max_num_seqs": len(workload.prompts), "max_model_len": workload.max_model_len}
    lora: dict[str, Any] = {"enable_lora": True, "max_loras": NUM_ADAPTERS, "max_lora_rank": RANK}
    found: dict[str, list[Run]] = {name: [] for name in names}
    with random_engine(load.shape, session.device, **limits, **lora, **PLAIN) as engine:
        *weights, another = (_random_adapter(engine, load.shape, i) for i in range(NUM_ADAPTERS + 1))
        loaded = [engine.add_lora(each.digest, each).name for each in weights]
        count = len(workload.prompts)
        chosen: dict[str, list[str | None]] = {
            ALL: [loaded[i % NUM_ADAPTERS] for i in range(count)], NONE: [None] * count, ONE: [loaded[0]] * count,
        }  # fmt: skip
        warm_up(engine, workload)
        run_workload(engine, workload.with_output(4), loras=chosen[ALL], ends_at=session.ends_at)
        for number in range(load.rounds):
            prompts = workload.with_other_tokens(number) if number else workload
            for name in names:
                found[name].append(run_workload(engine, prompts, loras=chosen[name], ends_at=session.ends_at))
        return found, _swap_seconds(engine, another)


def _swap_seconds(engine: Engine, weights: AdapterWeights) -> float:
    """Median of some swaps of one adapter, whose number is another each time."""
    workload, taken = equal_requests("swap", 1, 8, 1, 16), []
    for _ in range(NUM_SWAPS):
        began = time.perf_counter()
        name = engine.add_lora("another", weights).name
        run_workload(engine, workload, loras=[name])
        loaded = time.perf_counter() - began
        taken.append(loaded - run_workload(engine, workload, loras=[name]).seconds)
        engine.remove_lora(name)
    return median(taken)


def _random_adapter(engine: Engine, shape: Shape, number: int) -> AdapterWeights:
    """Of all linear layers, large enough to change what the model says."""
    dtype, device = getattr(torch, engine.config.dtype), torch.device(engine.config.device)
    layout = SlotLayout(shape.model, RANK)
    scales = torch.full((layout.num_scales,), RANK**0.5, dtype=scale_dtype(dtype))
    generator = torch.Generator(device).manual_seed(number)
    values = torch.empty(layout.num_values, dtype=dtype, device=device)
    values.normal_(0.0, shape.model.hidden_size**-0.5, generator=generator)
    return AdapterWeights(values.cpu(), scales, f"random {number}", RANK)


def _check_outputs(base: Run, adapted: Run) -> None:
    """The adapters were computed: no request may give what the base makes of its prompt."""
    same = sum(one == other for one, other in zip(base.outputs, adapted.outputs, strict=True))
    assert not same, f"{same} requests gave the base's tokens"


def _row(name: str, runs: list[Run], bases: list[Run]) -> dict[str, Any]:
    seconds, base = (median(run.seconds for run in each) for each in (runs, bases))
    return {
        "variant": name, "seconds": seconds, "share": base / seconds, "rounds": len(runs),
        "output_tokens_s": runs[0].num_output_tokens / seconds, "captured": runs[0].captured_share,
    }  # fmt: skip
