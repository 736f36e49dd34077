"""Host overhead: what the engine thread costs per row and step, however long the contexts and however full the cache.

Every microsecond that this thread takes must hide behind the step that the device is running: at 1024 rows and a 10 ms decode
step, 1 µs a row is a tenth of it. Counted is all that an EngineWorker's thread does between one step and the next, on a
FakeRunner: look into the inbox, plan, submit, commit, allocate, hash and publish blocks, make deltas and records, hand them to
streams and the record log, collect garbage. Taken off is the time inside the runner's ``submit`` and ``collect``, which
the thread's clock brackets at every call (`GatedRunner`; reading the clock itself, twice a step, stays in the figure).
Nobody waits on a stream while the clock runs: waking readers is not counted, and their own work is not this thread's.

The clock is the engine thread's CPU time, so that other work on the machine costs cache lines and not the measurement. Every
sequence decodes: prompts are computed before the clock starts, and rows differ in length, so that they cross block boundaries
in different steps. Cases with the same number of rows are interleaved round by round; a case's figure is the median of its
rounds, beside the lowest and highest. With `cached` blocks, at least so many are matchable and held by nobody all the time,
and there are no others: each block that a row takes evicts one.
"""

from __future__ import annotations

import argparse
import gc
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np

from engine.config import EngineConfig
from engine.engine import Engine
from engine.fake_runner import FakeRunner
from engine.plan import KVSpec, StepPlan, StepResult
from engine.sampling_params import SamplingParams
from engine.stream import RequestStream
from engine.worker import EngineWorker

BLOCK_SIZE = 16
VOCAB_SIZE = 32_000
PREFILL_TOKENS = 1 << 20  # prompt tokens a step, before the clock starts
FILLER_BLOCKS = 512  # cached blocks that one ended request leaves behind
PATIENCE_S = 600.0  # for one round, or for the prompts of one case
LIMIT_US = 1.0  # per row and step, at the largest number of rows
LIMIT_RATIO = 1.1  # of the longest contexts to the shortest, and of a full cache to an empty one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 256, 1024])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 16_384, 131_072])
    parser.add_argument(
        "--max-tokens", type=int, default=256 * 131_072,
        help="leave out cases whose contexts are longer together: a million tokens take about 80 MB of host memory",
    )  # fmt: skip
    parser.add_argument("--cached", type=int, default=100_000, help="cached blocks of the case that has them")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--steps", type=int, default=256, help="steps a round; with 256, each round has one keyframe"
    )


class GatedRunner:
    """A FakeRunner that lets the engine thread go on for so many steps, and clocks that thread meanwhile, less its own time.

    ``run`` is called from another thread; the engine thread waits in ``submit`` once its steps are used up.
    """

    def __init__(self, runner: FakeRunner) -> None:
        self._runner = runner
        self.max_inflight = runner.max_inflight
        self._left = 0
        self._began_ns = self._inside_ns = self._spent_ns = 0
        self._go = threading.Semaphore(0)
        self._stopped = threading.Semaphore(0)
        self._open = False

    def run(self, num_steps: int) -> int:
        """Let the thread run so many steps; nanoseconds of CPU time that they took it outside of this runner."""
        self._left = num_steps
        self._go.release()
        assert self._stopped.acquire(timeout=PATIENCE_S), "the engine thread does not come back"
        return self._spent_ns

    def await_first(self) -> None:
        """Return when the engine thread stands before its first step."""
        assert self._stopped.acquire(timeout=PATIENCE_S), "the engine thread submits nothing"

    def open(self) -> None:
        """Let the thread go for good."""
        self._open = True
        self._go.release()

    def submit(self, plan: StepPlan) -> None:
        entered = time.thread_time_ns()
        if not self._left and not self._open:
            self._spent_ns = entered - self._began_ns - self._inside_ns
            self._stopped.release()
            self._go.acquire()
            self._inside_ns = 0
            entered = self._began_ns = time.thread_time_ns()
        self._left -= 1
        self._runner.submit(plan)
        self._inside_ns += time.thread_time_ns() - entered

    def collect(self) -> StepResult:
        entered = time.thread_time_ns()
        result = self._runner.collect()
        self._inside_ns += time.thread_time_ns() - entered
        return result

    def reset_rows(self) -> None:
        self._runner.reset_rows()

    def sleep(self, level: int) -> None:
        self._runner.sleep(level)

    def wake_up(self) -> None:
        self._runner.wake_up()

    def close(self) -> None:
        self._runner.close()


@dataclass
class Case:
    """One number of rows, one context length, one number of cached blocks; `rounds_us` is µs per row and step."""

    num_rows: int
    context: int
    num_cached: int
    max_steps: int  # that it will ever run
    rounds_us: list[float] = field(default_factory=list)
    num_tokens: int = 0  # that reached the streams in those rounds

    def start(self) -> None:
        """Fill the cache, compute all prompts, and stop before the first step in which all rows decode."""
        rows = _prompts(self.num_rows, self.context, first=0, spread=min(512, self.context // 4))
        room = (
            self.max_steps + self.num_rows + BLOCK_SIZE
        )  # a row may decode while others' prompts are computed
        num_held = sum(-(-len(prompt) // BLOCK_SIZE) for prompt in rows)
        num_grown = self.num_rows * (room // BLOCK_SIZE + 1)
        num_fillers = (self.num_cached + num_grown) // FILLER_BLOCKS + 2 if self.num_cached else 0
        num_blocks = num_held + (num_fillers * FILLER_BLOCKS or num_grown)
        max_model_len = max(self.context, FILLER_BLOCKS * BLOCK_SIZE) + room
        self._runner = GatedRunner(FakeRunner(num_blocks, BLOCK_SIZE, vocab_size=VOCAB_SIZE, verify=False))
        config = EngineConfig(
            model="fake",
            block_size=BLOCK_SIZE,
            num_blocks=num_blocks,
            max_batched_tokens=PREFILL_TOKENS,
            max_num_seqs=self.num_rows,
            max_model_len=max_model_len,
        )
        spec = KVSpec(num_layers=1, num_kv_heads=1, head_size=64, block_size=BLOCK_SIZE, dtype_bytes=2)
        engine = Engine(
            config, self._runner, kv_spec=spec, eos_token_ids=frozenset({0}), vocab_size=VOCAB_SIZE
        )
        self._worker = EngineWorker(engine)
        self._worker.start()
        fillers = _prompts(num_fillers, FILLER_BLOCKS * BLOCK_SIZE + 1, first=1 << 14, spread=1)
        filling = self._submit(fillers, 1)
        self._streams = self._submit(rows, None)
        self._runner.await_first()
        while not all(stream.drain() for stream in (*filling, *self._streams)):
            self._runner.run(1)

    def _submit(self, prompts: Sequence[Sequence[int]], max_tokens: int | None) -> list[RequestStream]:
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=0)
        return self._worker.submit_all(prompts, [params] * len(prompts)) if prompts else []

    def run_round(self, num_steps: int) -> None:
        """Run `num_steps` steps and keep what they cost."""
        before = self._drain()
        spent_ns = self._runner.run(num_steps)
        num_tokens = self._drain() - before
        assert num_tokens == num_steps * self.num_rows, (
            f"{num_tokens} tokens of {num_steps} × {self.num_rows}"
        )
        self.num_tokens += num_tokens
        self.rounds_us.append(spent_ns / 1e3 / num_tokens)

    def _drain(self) -> int:
        return sum(stream.drain() for stream in self._streams)

    def close(self) -> None:
        """End the engine thread; check that the cache was as full as asked to the end."""
        stats = self._worker.stats()
        assert stats.num_cached_blocks >= self.num_cached, (
            f"{stats.num_cached_blocks} cached blocks were left"
        )
        assert not self.num_cached or stats.num_free_blocks == stats.num_cached_blocks, (
            "some free blocks were empty"
        )
        self._runner.open()
        self._worker.close()

    def figures(self) -> dict[str, float | int]:
        return {
            "rows": self.num_rows,
            "context": self.context,
            "cached_blocks": self.num_cached,
            "tokens": self.num_tokens,
            "us_per_row_step": round(median(self.rounds_us), 3),
            "lowest": round(min(self.rounds_us), 3),
            "highest": round(max(self.rounds_us), 3),
        }


def _prompts(count: int, num_tokens: int, *, first: int, spread: int) -> list[tuple[int, ...]]:
    """Prompts that share no block, of `num_tokens` tokens less up to `spread` of them; numbered from `first`.

    Lengths spread over a memory page of the token lists: with equal ones all lists' ends would fall on the same cache sets.
    """
    base = np.random.default_rng(0).integers(1, VOCAB_SIZE, num_tokens).tolist()
    return [
        (row % VOCAB_SIZE, row // VOCAB_SIZE, *base[2 : num_tokens - row * 61 % spread])
        for row in range(first, first + count)
    ]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all cases, print the table, return the figures."""
    print("engine thread: CPU µs per row and step")
    print(f"{'rows':>6} {'context':>9} {'cached':>8} {'median':>8} {'lowest':>8} {'highest':>8}")
    left_out = [(rows, size) for rows in args.rows for size in args.contexts if rows * size > args.max_tokens]
    cases = [case for num_rows in args.rows for case in _measure(num_rows, args)]
    for num_rows, context in left_out:
        print(f"left out: {num_rows} rows × {context} tokens, more than --max-tokens")
    return {"cases": [case.figures() for case in cases], "left_out": left_out, **_bar(cases)}


def _measure(num_rows: int, args: argparse.Namespace) -> list[Case]:
    """All cases with so many rows, in alternation."""
    sizes = [(context, 0) for context in args.contexts if num_rows * context <= args.max_tokens]
    if args.cached and sizes:
        sizes.append((min(args.contexts), args.cached))
    cases = [Case(num_rows, *size, (args.rounds + 1) * args.steps) for size in sizes]
    for case in cases:
        case.start()
    gc.collect()
    gc.freeze()  # the contexts' own objects are as old as a long-running engine's
    for case in cases:
        case.run_round(args.steps)  # warm-up
        case.rounds_us.clear()
        case.num_tokens = 0
    for _ in range(args.rounds):
        for case in cases:
            case.run_round(args.steps)
    for case in cases:
        shown = case.figures()
        print(
            f"{shown['rows']:>6} {shown['context']:>9} {shown['cached_blocks']:>8} {shown['us_per_row_step']:>8.2f}"
            f" {shown['lowest']:>8.2f} {shown['highest']:>8.2f}",
            flush=True,
        )
        case.close()
    gc.unfreeze()
    gc.collect()
    return cases


def _bar(cases: Sequence[Case]) -> dict[str, Any]:
    """The figures that are judged, each at the largest number of rows that it was measured at."""
    most = max(case.num_rows for case in cases)
    worst = max(median(case.rounds_us) for case in cases if case.num_rows == most)
    least = min(case.context for case in cases)
    shortest = {case.num_rows: case for case in cases if (case.context, case.num_cached) == (least, 0)}
    longest = max(cases, key=lambda case: (case.context, case.num_rows))
    full = max(cases, key=lambda case: (case.num_cached, case.num_rows))
    ratios = {
        "context_ratio": _ratio(longest, shortest[longest.num_rows]),
        "cached_ratio": _ratio(full, shortest[full.num_rows]),
    }
    print(f"\n{most} rows: {worst:.2f} µs per row and step at most (bar {LIMIT_US:g})")
    for case, (name, ratio) in zip((longest, full), ratios.items(), strict=True):
        print(f"{name} at {case.num_rows} rows: {ratio:.3f} × (bar {LIMIT_RATIO:g})")
    return {"worst_us": round(worst, 3), **ratios, "limit_us": LIMIT_US, "limit_ratio": LIMIT_RATIO}


def _ratio(case: Case, base: Case) -> float:
    """Of neighbouring rounds: both sides saw the same machine."""
    return round(median(a / b for a, b in zip(case.rounds_us, base.rounds_us, strict=True)), 3)
