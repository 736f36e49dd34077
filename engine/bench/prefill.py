"""Prefill at Qwen3-8B's shape in bfloat16: one prompt of 32k tokens, 16 of 2k, and a 32k prompt of which 90 % is cached.

A prefill multiplies: its floor is 2·P·T for the weights and 4·L·H·D for every pair of query and key that causal attention sees,
over the matrix rate measured in this run. A warm prompt computes its new tenth only, over the keys of all of it, and its time to
first token is held against that. Each request asks for one token.

Ablations: the warm prompt without the prefix cache; and in a pool that holds one prompt, where a second one drives the first
out before it comes again: with a host tier its blocks return from host memory, without one they are computed.
"""

from __future__ import annotations

import argparse
from statistics import median
from typing import Any

from engine.bench.parts.floors import ModelCost
from engine.bench.parts.phases import phases
from engine.bench.parts.random_engine import random_engine
from engine.bench.parts.report import Bar, print_table
from engine.bench.parts.session import Session, add_arguments, open_session
from engine.bench.parts.shapes import QWEN3_8B, TINY, Shape
from engine.bench.parts.throughput import warm_up
from engine.bench.parts.workload import Run, Workload, equal_requests, run_workload
from engine.engine import Engine

__all__ = ["add_arguments", "measure", "run"]

COLD_BAR = (0.45, 0.70)  # share of the matrix rate
WARM_BAR = Bar(
    "prefill, warm, time to first token over its floor", 1.5, 1.1, is_lower_better=True, percent=False
)
ROUNDS = 3
CACHED_SHARE = 0.9
BLOCK_SIZE = 16


def run(options: argparse.Namespace) -> dict[str, Any]:
    return measure(open_session(options), options)


def measure(session: Session, options: argparse.Namespace) -> dict[str, Any]:
    """Measure in an open session; prints tables, returns figures."""
    shape, cases = prefill_cases(session.is_tiny)
    cost, longest = ModelCost(shape.model, session.dtype_bytes), cases[0]
    limits: dict[str, Any] = {
        "max_num_seqs": max(len(case.prompts) for case in cases), "max_model_len": longest.max_model_len,
    }  # fmt: skip
    rows, verdicts = [], []
    with random_engine(shape, session.device, **limits) as engine:
        warm_up(engine, longest)
        for case in cases:
            row = _measure_cold(session, engine, case, cost)
            rows.append(row)
            bar = Bar(f"prefill, {case.name}, share of the floor", *COLD_BAR)
            verdicts.append(bar.judge(row["of_floor"], is_tiny=session.is_tiny))
        runs, cached = _run_warm(session, engine, longest)
    floor_s = cost.prefill_s(session.limits, [(cached, longest.num_input_tokens - cached)])
    rows.append(_row("warm", runs, longest.num_input_tokens - cached, floor_s, session))
    verdicts.append(WARM_BAR.judge(rows[-1]["ttft_over_floor"], is_tiny=session.is_tiny))
    if not options.no_ablations and session.has_room("ablation 'prefix cache off'", 30):
        with random_engine(shape, session.device, **limits, enable_prefix_cache=False) as engine:
            warm_up(engine, longest)
            runs, none = _run_warm(session, engine, longest)
        assert none == 0, f"{none} tokens came from a prefix cache that is off"
        rows.append(_row("warm, prefix cache off", runs, longest.num_input_tokens, floor_s, session))
    returned: dict[str, Any] = {}
    if not options.no_ablations and session.has_room("ablation 'host tier'", 60):
        returned = _measure_return(session, shape, longest, cost, rows)
    print_table(f"prefill at {shape.name}'s shape", rows)
    return {
        **session.figures(), "shape": shape.name, "cases": rows, "cached_tokens": cached, "verdicts": verdicts, **returned,
    }  # fmt: skip


def _measure_cold(session: Session, engine: Engine, case: Workload, cost: ModelCost) -> dict[str, Any]:
    rounds = 1 if session.is_tiny else ROUNDS
    runs = [run_workload(engine, case.with_other_tokens(i), ends_at=session.ends_at) for i in range(rounds)]
    floor_s = cost.prefill_s(session.limits, [(0, n) for n, _ in case.lengths])
    return _row(case.name, runs, case.num_input_tokens, floor_s, session)


def _run_warm(session: Session, engine: Engine, case: Workload) -> tuple[list[Run], int]:
    """Rounds of prompts whose first 90 % another one has left in the cache; tokens that were found there."""
    prompt, block_size = case.prompts[0], engine.config.block_size
    shared = int(CACHED_SHARE * len(prompt)) // block_size * block_size
    run_workload(engine, case, ends_at=session.ends_at)
    runs = []
    for number in range(1 if session.is_tiny else ROUNDS):
        suffix = case.with_other_tokens(100 + number).prompts[0][shared:]
        warm = Workload("warm", [prompt[:shared] + suffix], [1])
        runs.append(run_workload(engine, warm, ends_at=session.ends_at))
    found = {run.requests[0].num_cached_tokens for run in runs}
    assert found in ({0}, {shared}), f"of {shared} shared tokens {found} came from the cache"
    return runs, found.pop()


def _measure_return(
    session: Session, shape: Shape, case: Workload, cost: ModelCost, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """A prompt that was driven out of the pool comes again, with and without a host tier; adds their rows."""
    blocks = -(-case.max_model_len // BLOCK_SIZE)
    settings: dict[str, Any] = {
        "max_num_seqs": 1, "max_model_len": case.max_model_len, "block_size": BLOCK_SIZE, "num_blocks": blocks,
    }  # fmt: skip
    seconds = {}
    for name, slots in (("returns from the host", 2 * blocks), ("returns, host tier off", 0)):
        with random_engine(
            shape, session.device, **settings, swap_space_bytes=slots * BLOCK_SIZE * cost.kv_token_bytes
        ) as engine:
            warm_up(engine, case)
            runs = _run_return(session, engine, case)
        cached = runs[0].requests[0].num_cached_tokens
        computed = case.num_input_tokens - cached
        floor_s = cost.prefill_s(session.limits, [(cached, computed)])
        rows.append(_row(name, runs, computed, floor_s, session))
        seconds[name] = rows[-1]["longest_ttft_s"]
    from_host, computed_again = seconds.values()  # to first token
    return {"returned_over_computed": round(from_host / computed_again, 4)}


def _run_return(session: Session, engine: Engine, case: Workload) -> list[Run]:
    """Rounds of one prompt, each after another that took its blocks."""
    run_workload(engine, case, ends_at=session.ends_at)
    runs = []
    for number in range(1 if session.is_tiny else ROUNDS):
        run_workload(engine, case.with_other_tokens(200 + number), ends_at=session.ends_at)
        runs.append(run_workload(engine, case, ends_at=session.ends_at))
    whole = (case.num_input_tokens - 1) // BLOCK_SIZE * BLOCK_SIZE
    for run in runs:
        found = run.requests[0].num_cached_tokens
        # The pool has room for the last token's block, so that one of the prompt's may have stayed in it.
        is_right = found == whole if engine.stats().num_host_blocks else found <= BLOCK_SIZE
        assert is_right, (
            f"{found} tokens were found of {whole}, with a tier of {engine.stats().num_host_blocks} blocks"
        )
    return runs


def _row(name: str, runs: list[Run], tokens: int, floor_s: float, session: Session) -> dict[str, Any]:
    """One line of the table; `tokens` are those that were computed."""
    seconds, ttft_s = median(run.seconds for run in runs), median(map(_longest_ttft_s, runs))
    bound = phases(runs[0].steps, session.limits)[0].spent.bound
    return {
        "case": name, "tokens": tokens, "seconds": seconds, "floor_s": floor_s, "of_floor": round(floor_s / seconds, 4),
        "longest_ttft_s": ttft_s, "ttft_over_floor": round(ttft_s / floor_s, 3), "bound_by": bound,
    }  # fmt: skip


def _longest_ttft_s(run: Run) -> float:
    return max(((r.first_token_ns or r.finished_ns) - r.arrival_ns) / 1e9 for r in run.requests)


def prefill_cases(is_tiny: bool) -> tuple[Shape, list[Workload]]:
    """The shape and its cold cases, the longest prompt first."""
    shape, sizes = (TINY, ((1, 96), (4, 32))) if is_tiny else (QWEN3_8B, ((1, 32768), (16, 2048)))
    return shape, [
        equal_requests(f"{rows} × {tokens}", rows, tokens, 1, shape.model.vocab_size)
        for rows, tokens in sizes
    ]
