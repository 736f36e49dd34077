"""Host overhead: what scheduler and block pool cost per row and step, and that it does not grow with the context.

Every microsecond that planning and committing take must hide behind the step that the device is running; at 256 rows and
a 2 ms decode step, 3 µs a row is a third of it. The FakeRunner's own time is excluded: only ``Scheduler.plan`` and
``Scheduler.commit`` are inside the clock, with one step in flight behind them. A second table times a whole
``Engine.step`` less its runner, which adds streams' deltas and records.

The clock is this thread's CPU time, so that other work on the machine costs cache lines and not the measurement. Every
sequence decodes: contexts are filled before the clock starts, and rows differ in length, so that they cross block boundaries
in different steps. Cases are interleaved round by round; a round's figure is its total over rows and steps (block allocation,
hashing and the garbage collector included), a case's figure the median of its rounds, beside the lowest and highest.
"""

from __future__ import annotations

import argparse
import gc
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np

from engine.cache.block_pool import BlockPool
from engine.cache.sequence_blocks import SequenceBlocks
from engine.config import EngineConfig
from engine.engine import Engine
from engine.fake_runner import FakeRunner
from engine.plan import KVSpec, StepPlan, StepResult
from engine.request import Request
from engine.request import Sequence as RequestSequence
from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler

BLOCK_SIZE = 16
VOCAB_SIZE = 32_000
NUM_LEFT = 1 << 20  # output tokens that a sequence may still make: none ends under the clock
MAX_CASE_TOKENS = 256 * 131_072  # tokens that one case may hold: bounds this benchmark's own memory
ROWS_OF_THE_BAR = 256
LIMIT_US = 3.0
LIMIT_RATIO = 1.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 256, 1024])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 8192, 131_072])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--steps", type=int, default=128, help="steps a round; a multiple of 16 counts whole blocks"
    )


@dataclass
class Case(ABC):
    """One number of rows at one context length; `rounds_us` is µs per row and step."""

    num_rows: int
    context: int
    rounds_us: list[float] = field(default_factory=list)

    @abstractmethod
    def run_round(self, num_steps: int) -> None:
        """Run `num_steps` steps and append what they cost."""

    def figures(self) -> dict[str, float | int]:
        return {
            "rows": self.num_rows,
            "context": self.context,
            "us_per_row_step": round(median(self.rounds_us), 3),
            "lowest": round(min(self.rounds_us), 3),
            "highest": round(max(self.rounds_us), 3),
        }


class SchedulerCase(Case):
    """Scheduler and pool alone."""

    def __init__(self, num_rows: int, context: int, num_steps: int) -> None:
        super().__init__(num_rows, context)
        num_blocks = num_rows * (-(-(context + num_steps) // BLOCK_SIZE) + 2)
        self.blocks = SequenceBlocks(
            BlockPool(num_blocks), BLOCK_SIZE, version_digest="", enable_prefix_cache=True
        )
        self.scheduler = Scheduler(
            self.blocks,
            max_batched_tokens=num_rows * context,
            max_num_seqs=num_rows,
            eos_token_ids=frozenset({0}),
        )
        self.runner = FakeRunner(num_blocks, BLOCK_SIZE, vocab_size=VOCAB_SIZE, verify=False)
        for row, prompt in enumerate(_prompts(num_rows, context)):
            request = Request(f"request-{row}", (), _PARAMS)
            self.scheduler.add(RequestSequence(request, prompt, len(prompt), len(prompt) + NUM_LEFT))
        self._submit()  # the whole prefill; from here on one step stays in flight

    def _submit(self) -> int:
        began = time.thread_time_ns()
        plan = self.scheduler.plan()
        spent = time.thread_time_ns() - began
        assert plan is not None
        assert plan.num_rows == self.num_rows, f"{plan.num_rows} rows planned of {self.num_rows}"
        self.runner.submit(plan)
        return spent

    def run_round(self, num_steps: int) -> None:
        spent = 0
        for _ in range(num_steps):
            spent += self._submit()
            result = self.runner.collect()
            began = time.thread_time_ns()
            self.scheduler.commit(result)
            self.blocks.take_events()
            spent += time.thread_time_ns() - began
        self.rounds_us.append(spent / 1e3 / num_steps / self.num_rows)


class ClockedRunner:
    """A FakeRunner that counts the time spent inside it, so that it can be taken off."""

    def __init__(self, runner: FakeRunner) -> None:
        self._runner = runner
        self.max_inflight = runner.max_inflight
        self.spent_ns = 0

    def submit(self, plan: StepPlan) -> None:
        began = time.thread_time_ns()
        self._runner.submit(plan)
        self.spent_ns += time.thread_time_ns() - began

    def collect(self) -> StepResult:
        began = time.thread_time_ns()
        result = self._runner.collect()
        self.spent_ns += time.thread_time_ns() - began
        return result

    def reset_rows(self) -> None:
        self._runner.reset_rows()

    def close(self) -> None:
        self._runner.close()


class EngineCase(Case):
    """Whole engine steps: scheduler, deltas, records."""

    def __init__(self, num_rows: int, context: int, num_steps: int) -> None:
        super().__init__(num_rows, context)
        max_model_len = context + num_steps + BLOCK_SIZE
        num_blocks = num_rows * (max_model_len // BLOCK_SIZE + 1)
        self.runner = ClockedRunner(FakeRunner(num_blocks, BLOCK_SIZE, vocab_size=VOCAB_SIZE, verify=False))
        config = EngineConfig(
            model="fake",
            block_size=BLOCK_SIZE,
            num_blocks=num_blocks,
            max_batched_tokens=num_rows * context,
            max_num_seqs=num_rows,
            max_model_len=max_model_len,
        )
        spec = KVSpec(num_layers=1, num_kv_heads=1, head_size=64, block_size=BLOCK_SIZE, dtype_bytes=2)
        self.engine = Engine(
            config, self.runner, kv_spec=spec, eos_token_ids=frozenset({0}), vocab_size=VOCAB_SIZE
        )
        for prompt in _prompts(num_rows, context):
            self.engine.add(self.engine.make_request(prompt, _PARAMS))
        self.engine.step()

    def run_round(self, num_steps: int) -> None:
        self.runner.spent_ns = 0
        began = time.thread_time_ns()
        for _ in range(num_steps):
            output = self.engine.step()
            assert len(output.deltas) == self.num_rows
        spent = time.thread_time_ns() - began - self.runner.spent_ns
        self.rounds_us.append(spent / 1e3 / num_steps / self.num_rows)


_PARAMS = SamplingParams(max_tokens=None, ignore_eos=True, seed=0)


def _prompts(num_rows: int, context: int) -> list[list[int]]:
    """Prompts that share no block, of `context` tokens less up to a quarter of them or 511.

    Lengths spread over a memory page of the token lists: with equal ones all lists' ends would fall on the same cache sets.
    """
    base = np.random.default_rng(0).integers(1, VOCAB_SIZE, context).tolist()
    spread = min(512, context // 4)
    return [
        [row % VOCAB_SIZE, row // VOCAB_SIZE, *base[2 : context - row * 61 % spread]]
        for row in range(num_rows)
    ]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all cases, print both tables, return the figures."""
    sizes = [(rows, context) for rows in args.rows for context in args.contexts]
    left_out = [size for size in sizes if size[0] * size[1] > MAX_CASE_TOKENS]
    total_steps = args.rounds * args.steps + args.steps
    scheduler = [SchedulerCase(*size, total_steps) for size in sizes if size not in left_out]
    whole = [EngineCase(rows, args.contexts[0], total_steps) for rows in args.rows]
    _measure([*scheduler, *whole], args.rounds, args.steps)
    _print_table("scheduler and pool (plan + commit)", scheduler)
    _print_table("whole engine step, less the runner", whole)
    for rows, context in left_out:
        print(f"left out: {rows} rows × {context} tokens, more than this benchmark may hold")
    return {
        "scheduler": [case.figures() for case in scheduler],
        "engine_step": [case.figures() for case in whole],
        "left_out": left_out,
        **_bar(scheduler),
    }


def _measure(cases: Sequence[Case], num_rounds: int, num_steps: int) -> None:
    gc.collect()
    gc.freeze()  # the contexts' own objects are as old as a long-running engine's
    for case in cases:
        case.run_round(num_steps)  # warm-up
        case.rounds_us.clear()
    for _ in range(num_rounds):
        for case in cases:
            case.run_round(num_steps)


def _bar(cases: Sequence[Case]) -> dict[str, Any]:
    """The two figures that are judged, where their cases were measured."""
    at_bar = {case.context: case.rounds_us for case in cases if case.num_rows == ROWS_OF_THE_BAR}
    if not at_bar:
        return {}
    shortest, longest = min(at_bar), max(at_bar)
    worst = max(median(rounds) for rounds in at_bar.values())
    # Of neighbouring rounds: both sides saw the same machine.
    ratio = median(long / short for long, short in zip(at_bar[longest], at_bar[shortest], strict=True))
    print(f"\n{ROWS_OF_THE_BAR} rows: {worst:.2f} µs per row and step at most (bar {LIMIT_US:g})")
    print(f"{longest} against {shortest} tokens of context: {ratio:.3f} × (bar {LIMIT_RATIO:g})")
    return {
        "worst_us": round(worst, 3),
        "context_ratio": round(ratio, 3),
        "limit_us": LIMIT_US,
        "limit_ratio": LIMIT_RATIO,
    }


def _print_table(title: str, cases: Sequence[Case]) -> None:
    print(
        f"\n{title}: CPU µs per row and step\n{'rows':>6} {'context':>9} {'median':>8} {'lowest':>8} {'highest':>8}"
    )
    for case in cases:
        shown = case.figures()
        print(
            f"{shown['rows']:>6} {shown['context']:>9} {shown['us_per_row_step']:>8.2f}"
            f" {shown['lowest']:>8.2f} {shown['highest']:>8.2f}"
        )
