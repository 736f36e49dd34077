"""Workload: all requests of a benchmark and when each is sent, fixed by a seed before the first one is.

A schedule that is made while the server answers bends to the server: a slow answer delays the next request and the queue that
it should have met is never seen. Here arrival times are drawn beforehand, and a late request is late by a known amount.

Boundary: plans. The network is `driver`'s; how many tokens a word has is told by the server (`target`).
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from workbench.bench.errors import BenchmarkError, TraceError
from workbench.bench.spec import BenchmarkSpec

Message = dict[str, Any]
_ARRIVAL_NAMES = ("arrival_s", "arrival", "timestamp", "time")
_INPUT_NAMES = ("input_tokens", "contexttokens", "prompt_tokens", "num_prompt_tokens")
_OUTPUT_NAMES = ("output_tokens", "generatedtokens", "completion_tokens", "num_output_tokens")


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request as it will be sent."""

    index: int  # negative: warm-up
    messages: tuple[Message, ...]
    max_tokens: int
    asked_input_tokens: int | None  # None: as the dataset has it
    at_s: float | None  # since the first one; None: when its turn comes

    @property
    def is_warmup(self) -> bool:
        return self.index < 0


@dataclass(frozen=True, slots=True)
class Workload:
    """Warm-up requests, then the measured ones, in the order of their arrival."""

    warmup: tuple[PlannedRequest, ...]
    measured: tuple[PlannedRequest, ...]
    concurrency: int | None  # closed loop; None: by each request's `at_s`
    forced_length: bool  # outputs go on past the model's own end, to the asked length
    digest: str  # equal for two runs that sent the same requests by the same plan

    @property
    def offered_rps(self) -> float | None:
        """Requests per second of the schedule; None in a closed loop or for one request."""
        last = self.measured[-1].at_s
        return (len(self.measured) - 1) / last if last else None


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request of a recorded trace."""

    arrival_s: float  # since the first
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class WordCosts:
    """What prompts are made of: a first word, and how many tokens each further one adds to a conversation."""

    lead: str
    lead_tokens: int  # of a conversation that says only `lead`
    words: tuple[str, ...]
    tokens: tuple[int, ...]  # of each, with the space before it

    def prompt(self, num_tokens: int, generator: np.random.Generator) -> str:
        """Random words; with the conversation's own tokens `num_tokens` in all, or as near below as words come."""
        costs = np.asarray(self.tokens)
        left = num_tokens - self.lead_tokens
        said = [self.lead]
        while left >= costs.min():
            fitting = np.flatnonzero(costs <= left)
            picks = generator.choice(fitting, size=max(int(left // costs[fitting].max()), 1))
            said += [self.words[pick] for pick in picks]
            left -= int(costs[picks].sum())
        return " ".join(said)


def poisson_times(rate: float, num_requests: int, seed: int) -> list[float]:
    """Arrival times of a Poisson process, s, the first at 0; the same for the same seed."""
    gaps = np.random.default_rng([seed, 1]).exponential(1.0 / rate, num_requests - 1)
    return [0.0, *np.cumsum(gaps).tolist()]


def synthetic(spec: BenchmarkSpec, costs: WordCosts) -> Workload:
    """Random prompts of equal length, outputs forced to theirs."""
    lengths = [(spec.input_tokens, spec.output_tokens)] * spec.requests
    times = poisson_times(spec.rate, spec.requests, spec.seed) if spec.rate else None
    return _of_lengths(spec, costs, lengths, times)


def from_trace(spec: BenchmarkSpec, costs: WordCosts, rows: Sequence[TraceRow]) -> Workload:
    """Random prompts of the recorded lengths, at the recorded times unless a concurrency is given."""
    rows = rows[: spec.requests]
    times = [row.arrival_s / spec.trace_speed for row in rows] if spec.closed_loop is None else None
    return _of_lengths(spec, costs, [(row.input_tokens, row.output_tokens) for row in rows], times)


def from_dataset(spec: BenchmarkSpec, conversations: Sequence[Sequence[Message]]) -> Workload:
    """The dataset's conversations, shuffled by the seed, again from the start when they do not suffice."""
    generator = np.random.default_rng([spec.seed, 2])
    total = spec.num_warmup + spec.requests
    order = np.concatenate(
        [generator.permutation(len(conversations)) for _ in range(-(-total // len(conversations)))]
    )
    times = poisson_times(spec.rate, spec.requests, spec.seed) if spec.rate else None
    planned = []
    for place in range(total):
        index = place - spec.num_warmup
        messages = tuple(dict(message) for message in conversations[int(order[place])])
        at_s = times[index] if times is not None and index >= 0 else None
        planned.append(PlannedRequest(index, messages, spec.output_tokens, None, at_s))
    return _workload(spec, planned, forced_length=False)


def read_trace(path: Path) -> list[TraceRow]:
    """The requests of a CSV file: arrival (seconds, or a time of day), input and output tokens.

    Raises:
        TraceError: no such file, a missing column, or a line that holds no such values, by its number.
    """
    try:
        with path.open(newline="", encoding="utf-8") as opened:
            reader = csv.DictReader(opened)
            names = {name.strip().lower(): name for name in reader.fieldnames or ()}
            columns = [
                _column(names, wanted, path) for wanted in (_ARRIVAL_NAMES, _INPUT_NAMES, _OUTPUT_NAMES)
            ]
            rows = [_trace_row(line, columns, number, path) for number, line in enumerate(reader, start=2)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TraceError(
            f"the trace {str(path)!r} cannot be read: {error}", value=str(path), param="trace",
            remedy="Give a CSV file with the columns arrival_s, input_tokens, output_tokens.",
        ) from error  # fmt: skip
    if not rows:
        raise TraceError(
            f"the trace {str(path)!r} has no requests", value=str(path), param="trace", remedy="Give one."
        )
    rows.sort(key=lambda row: row.arrival_s)
    first = rows[0].arrival_s
    return [TraceRow(row.arrival_s - first, row.input_tokens, row.output_tokens) for row in rows]


def read_conversations(path: Path) -> list[list[Message]]:
    """The conversations of a JSONL file: objects with "messages", or with "prompt" as text.

    Raises:
        BenchmarkError: no such file, or a line that is no such object, by its number.
    """
    found: list[list[Message]] = []
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BenchmarkError(
            f"the dataset {str(path)!r} cannot be read: {error}", value=str(path), param="dataset",
            remedy="Give a JSONL file, or the name of one in data/datasets.",
        ) from error  # fmt: skip
    for number, line in enumerate(lines, start=1):
        if line.strip():
            found.append(_conversation(line, number, path))
    if not found:
        raise BenchmarkError(
            f"the dataset {str(path)!r} is empty",
            value=str(path),
            param="dataset",
            remedy="Give one with examples.",
        )
    return found


def _of_lengths(
    spec: BenchmarkSpec,
    costs: WordCosts,
    lengths: Sequence[tuple[int, int]],
    times: Sequence[float] | None,
) -> Workload:
    generator = np.random.default_rng([spec.seed, 3])
    planned = []
    for index in range(-spec.num_warmup, len(lengths)):
        num_in, num_out = lengths[index % len(lengths)]
        messages = ({"role": "user", "content": costs.prompt(num_in, generator)},)
        at_s = times[index] if times is not None and index >= 0 else None
        planned.append(PlannedRequest(index, messages, num_out, num_in, at_s))
    return _workload(spec, planned, forced_length=True)


def _workload(spec: BenchmarkSpec, planned: Sequence[PlannedRequest], *, forced_length: bool) -> Workload:
    measured = tuple(request for request in planned if not request.is_warmup)
    told = [[request.messages, request.max_tokens, request.at_s] for request in measured]
    text = json.dumps([told, spec.closed_loop, spec.temperature, forced_length], sort_keys=True)
    return Workload(
        warmup=tuple(request for request in planned if request.is_warmup),
        measured=measured,
        concurrency=spec.closed_loop,
        forced_length=forced_length,
        digest=hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16],
    )


def _column(names: Mapping[str, str], wanted: Sequence[str], path: Path) -> str:
    for name in wanted:
        if name in names:
            return names[name]
    raise TraceError(
        f"the trace {path.name!r} has no column {wanted[0]}", value=sorted(names.values()), limit=wanted, param="trace",
        remedy="Name the columns arrival_s, input_tokens, output_tokens.",
    )  # fmt: skip


def _trace_row(line: Mapping[str, Any], columns: Sequence[str], number: int, path: Path) -> TraceRow:
    arrival, num_in, num_out = (line.get(column) or "" for column in columns)
    try:
        row = TraceRow(_seconds(arrival), int(num_in), int(num_out))
        if row.input_tokens < 1 or row.output_tokens < 1:
            raise ValueError("token counts must be at least 1")
        if not np.isfinite(row.arrival_s):
            raise ValueError("arrival is not finite")
    except ValueError as error:
        raise TraceError(
            f"line {number} of the trace {path.name!r} is not usable: {error}", value=dict(line), param="trace",
            remedy="Each line needs an arrival in seconds and two whole numbers of tokens.",
        ) from None  # fmt: skip
    return row


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        moment = datetime.fromisoformat(text.strip()[:26])
        return (moment - datetime(1970, 1, 1, tzinfo=moment.tzinfo)).total_seconds()


def _conversation(line: str, number: int, path: Path) -> list[Message]:
    try:
        example = json.loads(line)
        messages = example.get("messages")
        if messages is None and isinstance(example.get("prompt"), str):
            messages = [{"role": "user", "content": example["prompt"]}]
        if not messages or not all(isinstance(each, dict) and "role" in each for each in messages):
            raise ValueError('it has neither "messages" nor "prompt"')
    except (ValueError, AttributeError, TypeError) as error:
        raise BenchmarkError(
            f"line {number} of the dataset {path.name!r} is not usable: {error}", value=line[:200], param="dataset",
            remedy='Each line is one JSON object with "messages": [{"role": …, "content": …}].',
        ) from None  # fmt: skip
    return list(messages)
