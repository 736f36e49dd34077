"""Decoding beside long prompts: 64 sequences decode while prompts of 8k tokens arrive at random, at Qwen3-8B's shape in bfloat16.

The time between a sequence's tokens (ITL) grows with the prompt tokens that a step takes along; how many it may take is the
step's token budget, which trades ITL against the prompts' time to first token. The figure is the 99th percentile of all ITLs
while prompts arrive, over the median while none do, on the same engine. The device's idle share and the KV cache's waste (places
in held blocks that no token has) are taken from the step records of the same window.

Ablations: overlap off, graphs off.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.bench.parts.phases import idle_share, phases
from engine.bench.parts.random_engine import random_engine
from engine.bench.parts.report import Bar, print_table
from engine.bench.parts.session import Session, open_session
from engine.bench.parts.session import add_arguments as add_session_arguments
from engine.bench.parts.shapes import QWEN3_8B, TINY, Shape
from engine.bench.parts.throughput import ABLATIONS, AS_IT_IS, warm_up
from engine.bench.parts.workload import Collected, OutOfTime, Workload, add, drain, equal_requests
from engine.engine import Engine
from engine.kv_waste import kv_waste
from engine.records import StepRecord

ITL_BAR = Bar("mixed, p99 ITL over pure-decode ITL", 2.5, 1.5, is_lower_better=True, percent=False)
IDLE_BAR = Bar("mixed, idle share of the device", 0.05, 0.01, is_lower_better=True)
WASTE_BAR = Bar("mixed, KV waste", 0.02, 0.02, is_lower_better=True)


@dataclass(frozen=True, slots=True)
class Load:
    """What runs: `streams` that decode throughout, and prompts that arrive `rate` times a second for `duration_s`."""

    shape: Shape
    streams: int
    stream_tokens: int
    prompt_tokens: int
    prompt_output_tokens: int
    decode_steps: int  # of the window without prompts
    rate: float
    duration_s: float
    step_tokens: int  # max_batched_tokens

    @property
    def stream_workload(self) -> Workload:
        vocab_size = self.shape.model.vocab_size
        return equal_requests("streams", self.streams, self.stream_tokens, self.max_output_tokens, vocab_size)

    @property
    def max_output_tokens(self) -> int:
        """More than a stream can make in both windows: none ends."""
        return self.shape.model.max_position - self.stream_tokens - self.prompt_tokens

    def arrivals(self) -> deque[tuple[float, list[int]]]:
        """(seconds from the window's beginning, prompt) of a Poisson process; made before the clock starts."""
        draw = random.Random(0)
        vocab_size = self.shape.model.vocab_size
        found: deque[tuple[float, list[int]]] = deque()
        at_s = draw.expovariate(self.rate)
        while at_s < self.duration_s:
            found.append((at_s, [draw.randrange(vocab_size) for _ in range(self.prompt_tokens)]))
            at_s += draw.expovariate(self.rate)
        return found


FULL = Load(QWEN3_8B, 64, 1024, 8192, 32, 200, 1.0, 12.0, 512)
REDUCED = Load(TINY, 4, 20, 96, 4, 12, 8.0, 0.6, 24)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_session_arguments(parser)
    parser.add_argument("--step-tokens", type=int, help=f"token budget of a step; default {FULL.step_tokens}")


def run(options: argparse.Namespace) -> dict[str, Any]:
    return measure(open_session(options), options)


def measure(session: Session, options: argparse.Namespace) -> dict[str, Any]:
    """Measure in an open session; prints tables, returns figures."""
    load = REDUCED if session.is_tiny else FULL
    step_tokens = options.step_tokens or load.step_tokens
    variants: dict[str, dict[str, Any]] = {AS_IT_IS: {}}
    if not options.no_ablations:
        variants |= {name: ABLATIONS[name] for name in ("overlap off", "graphs off")}
    rows: list[dict[str, Any]] = []
    for name, settings in variants.items():
        if rows and not session.has_room(f"ablation {name!r}", 2 * load.duration_s + 15):
            break
        try:
            rows.append({"variant": name} | _measure_variant(session, load, step_tokens, settings))
        except OutOfTime:
            if not rows:
                raise
            print(f"ablation {name!r}: stopped, the budget ended while it ran")
    print_table(
        f"{load.streams} streams, prompts of {load.prompt_tokens} tokens at {load.rate:g}/s for {load.duration_s:g} s, "
        f"{step_tokens} tokens a step",
        [{k: v for k, v in row.items() if k != "phases"} for row in rows],
    )
    print_table(f"phases while prompts arrive, {AS_IT_IS}", rows[0]["phases"])
    judged = ((ITL_BAR, "itl_ratio"), (IDLE_BAR, "idle_share"), (WASTE_BAR, "kv_waste"))
    return {
        **session.figures(), "shape": load.shape.name, "streams": load.streams, "prompt_tokens": load.prompt_tokens,
        "rate": load.rate, "duration_s": load.duration_s, "step_tokens": step_tokens,
        "verdicts": [bar.judge(rows[0][key], is_tiny=session.is_tiny) for bar, key in judged], "variants": rows,
    }  # fmt: skip


def _measure_variant(
    session: Session, load: Load, step_tokens: int, settings: dict[str, Any]
) -> dict[str, Any]:
    rows = 2 * load.streams
    limits: dict[str, Any] = {"max_num_seqs": rows, "max_batched_tokens": max(step_tokens, rows)}
    workload = load.stream_workload
    with random_engine(load.shape, session.device, **limits, **settings) as engine:
        warm_up(engine, Workload("prompts", [[1] * load.prompt_tokens] * 4, [4] * 4))
        streams = {add(engine, prompt, load.max_output_tokens) for prompt in workload.prompts}
        taken = Collected()
        while not taken.steps or taken.steps[-1].num_decode_tokens < load.streams:
            taken.take(engine.step())
        decoding = len(taken.steps)
        for _ in range(load.decode_steps):
            taken.take(engine.step())
        mixing = len(taken.steps)
        prompts = _take_arrivals(session, engine, load, taken)
        drain(engine, streams)
        num_blocks, block_size = engine.stats().num_blocks, engine.config.block_size
    pure, window = taken.steps[decoding:mixing], taken.steps[mixing:]
    ended = [taken.requests[name] for name in prompts]
    ttft_ms = [((r.first_token_ns or r.finished_ns) - r.arrival_ns) / 1e6 for r in ended]
    decode_ms = float(np.median(_itl_ms(pure, streams)))
    p99_ms = float(np.percentile(_itl_ms(window, streams), 99))
    waste = kv_waste(taken.steps, num_blocks=num_blocks, block_size=block_size, last=len(window))
    return {
        "decode_itl_ms": decode_ms, "p99_itl_ms": p99_ms, "itl_ratio": p99_ms / decode_ms,
        "idle_share": idle_share(window), "decode_idle_share": idle_share(pure),
        "kv_waste": waste.share,
        "prompts": len(prompts), "median_ttft_ms": float(np.median(ttft_ms)),
        "phases": [phase.figures() for phase in phases(window, session.limits)],
    }  # fmt: skip


def _take_arrivals(session: Session, engine: Engine, load: Load, taken: Collected) -> list[str]:
    """Step until the last prompt has ended; returns the prompts' request ids."""
    due = load.arrivals()
    names: list[str] = []
    began = time.monotonic()
    while due or len(taken.requests) < len(names):  # the streams go on: whatever ends is a prompt
        now_s = time.monotonic() - began
        while due and due[0][0] <= now_s:
            names.append(add(engine, due.popleft()[1], load.prompt_output_tokens))
        taken.take(engine.step())
        if session.left_s < 0:
            raise OutOfTime("the budget ended while prompts arrived")
    return names


def _itl_ms(steps: Sequence[StepRecord], streams: set[str]) -> list[float]:
    """Milliseconds between tokens of the streams, over all of them: a row of one token gives one when its step ends."""
    last_ns: dict[str, int] = {}
    found = []
    for step in steps:
        for request_id, count in step.rows:
            if request_id in streams and count == 1:
                if request_id in last_ns:
                    found.append((step.ended_ns - last_ns[request_id]) / 1e6)
                last_ns[request_id] = step.ended_ns
    return found
