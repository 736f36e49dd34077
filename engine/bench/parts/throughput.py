"""Running a workload on random engines: the engine as it is, and the same with one thing of it turned off.

Variants run one after another, each engine alone on the device, because two of them with their KV caches do not fit beside
each other; the engine as it is runs again after the ablations, so that a drift of the device between them shows.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from engine.bench.parts.phases import phases
from engine.bench.parts.random_engine import random_engine
from engine.bench.parts.report import print_table
from engine.bench.parts.session import Session
from engine.bench.parts.shapes import Shape
from engine.bench.parts.workload import OutOfTime, Run, Workload, equal_requests, run_workload
from engine.engine import Engine
from engine.errors import ConfigError

AS_IT_IS = "as it is"
ABLATIONS: dict[str, dict[str, Any]] = {
    "graphs off": {"enforce_eager": True},
    "overlap off": {"async_scheduling": False},
    "prefix cache off": {"enable_prefix_cache": False},
}


@dataclass(frozen=True)
class Measured:
    """An engine's rounds of one workload."""

    runs: list[Run]
    start_s: float  # until the engine was built and warm

    @property
    def seconds(self) -> float:
        return median(run.seconds for run in self.runs)

    def figures(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds, "lowest": min(run.seconds for run in self.runs),
            "highest": max(run.seconds for run in self.runs), "rounds": len(self.runs),
            "output_tokens_s": self.runs[0].num_output_tokens / self.seconds, "start_s": self.start_s,
            "captured": self.runs[0].captured_share, "overlapped": self.runs[0].overlapped_share,
        }  # fmt: skip


def measure_engine(
    session: Session, shape: Shape, workload: Workload, *, rounds: int = 1, **settings: Any
) -> Measured:
    """Build an engine that runs the whole workload at once, warm it up, and run the rounds, each with tokens of its own.

    Raises:
        ConfigError: a setting that this engine does not have.
        OutOfTime: the session's budget ended.
    """
    began = time.perf_counter()
    fitting = {"max_num_seqs": len(workload.prompts), "max_model_len": workload.max_model_len}
    with random_engine(shape, session.device, **fitting | settings) as engine:
        warm_up(engine, workload)
        start_s = time.perf_counter() - began
        runs = []
        for number in range(rounds):
            prompts = workload.with_other_tokens(number) if number else workload
            runs.append(run_workload(engine, prompts, ends_at=session.ends_at))
    return Measured(runs, start_s)


def warm_up(engine: Engine, workload: Workload) -> None:
    """Short and long contexts, few and many rows: kernels are compiled at their first launch."""
    vocab_size = 1 + max(map(max, workload.prompts))
    for requests, length in ((1, 16), (4, max(map(len, workload.prompts)))):
        length = min(length, workload.max_model_len - 1)
        output_tokens = min(4, workload.max_model_len - length)
        prompts = equal_requests(
            "warm-up", min(requests, len(workload.prompts)), length, output_tokens, vocab_size, -length
        )
        run_workload(engine, prompts)


def measure_ablations(
    session: Session, shape: Shape, workload: Workload, names: Sequence[str] = tuple(ABLATIONS)
) -> list[dict[str, Any]]:
    """The workload on the engine as it is, with each of the named parts off, and as it is again; prints the table.

    `captured` and `overlapped` are shares of the steps, from their records: whether what is turned off was on.
    """
    variants = [(AS_IT_IS, {}), *((name, ABLATIONS[name]) for name in names), (f"{AS_IT_IS}, again", {})]
    rows: list[dict[str, Any]] = []
    base: Measured | None = None
    for name, changes in variants:
        # Room for the longest that a variant may take: without graphs a step takes longer.
        if base is not None and not session.has_room(f"ablation {name!r}", 2.5 * base.seconds + base.start_s):
            break
        row: dict[str, Any] = dict.fromkeys(("variant", "seconds", "ratio", "captured", "overlapped"))
        row |= {"variant": name, "note": ""}
        rows.append(row)
        try:
            measured = measure_engine(session, shape, workload, **changes)
        except ConfigError as error:
            row["note"] = f"absent: {error}"
            continue
        except OutOfTime as error:
            row["note"] = f"stopped: {error}"
            break
        base = base or measured
        row |= {"seconds": measured.seconds, "ratio": round(measured.seconds / base.seconds, 4)}
        row |= {"captured": measured.runs[0].captured_share, "overlapped": measured.runs[0].overlapped_share}
    print_table(f"ablations: {workload.num_input_tokens} tokens in, {workload.num_output_tokens} out", rows)
    return rows


def print_phases(session: Session, run: Run) -> list[dict[str, Any]]:
    """What bounds prefill and decode of a run: prints the table, returns its rows."""
    rows = [phase.figures() for phase in phases(run.steps, session.limits)]
    print_table("phases: seconds that passed, and the least seconds by what they are spent on", rows)
    return rows
