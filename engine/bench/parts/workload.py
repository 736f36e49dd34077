"""Workloads: requests that arrive at once, and running them on an engine with every step recorded.

Boundary: drives ``Engine.step`` in the caller's thread, as ``engine.llm`` does; no streams, no text.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from engine.engine import Engine, StepOutput
from engine.records import RequestRecord, StepRecord
from engine.sampling_params import SamplingParams
from engine.structured_outputs import StructuredOutputsParams


class OutOfTime(Exception):
    """The benchmark's budget ended while requests ran; they were aborted."""


@dataclass(frozen=True)
class Workload:
    """Prompts and how many tokens each is continued by; end-of-sequence is ignored."""

    name: str
    prompts: list[list[int]]
    output_tokens: list[int]
    temperature: float = 0.0

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """(input, output) tokens of each request."""
        return [(len(p), n) for p, n in zip(self.prompts, self.output_tokens, strict=True)]

    @property
    def num_input_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def num_output_tokens(self) -> int:
        return sum(self.output_tokens)

    @property
    def max_model_len(self) -> int:
        """The longest request."""
        return max(map(sum, self.lengths))

    def with_other_tokens(self, seed: int) -> Workload:
        """The same lengths with tokens that share no prefix with these, for another round on the same engine."""
        draw = random.Random(f"{self.name} {seed}")
        most = max(map(max, self.prompts))
        prompts = [[draw.randint(0, most) for _ in prompt] for prompt in self.prompts]
        return replace(self, prompts=prompts)

    def with_output(self, num_tokens: int) -> Workload:
        """The same prompts, each continued by at most so many tokens."""
        return replace(self, output_tokens=[min(n, num_tokens) for n in self.output_tokens])

    def figures(self) -> dict[str, int | float | str]:
        return {
            "workload": self.name, "requests": len(self.prompts), "input_tokens": self.num_input_tokens,
            "output_tokens": self.num_output_tokens, "temperature": self.temperature,
        }  # fmt: skip


def equal_requests(
    name: str, requests: int, input_tokens: int, output_tokens: int, vocab_size: int, seed: int = 0
) -> Workload:
    """Random prompts of one length."""
    draw = random.Random(seed)
    prompts = [[draw.randrange(vocab_size) for _ in range(input_tokens)] for _ in range(requests)]
    return Workload(name, prompts, [output_tokens] * requests)


def mixed_requests(requests: int, shortest: int, longest: int, max_token_id: int) -> Workload:
    """Prompts and outputs of random lengths, drawn as nano-vllm's benchmark draws them from seed 0.

    The order of the draws makes the workload: per prompt its length, then its tokens; after all prompts the output lengths.
    256 requests of 100 to 1024 with token ids up to 10,000 give 133,966 output tokens.
    """
    draw = random.Random(0)
    prompts = [
        [draw.randint(0, max_token_id) for _ in range(draw.randint(shortest, longest))]
        for _ in range(requests)
    ]
    outputs = [draw.randint(shortest, longest) for _ in range(requests)]
    return Workload("nano", prompts, outputs, temperature=0.6)


@dataclass(frozen=True)
class Run:
    """A workload that ran: its time, its steps, and what each request got, in order of the prompts."""

    seconds: float
    steps: list[StepRecord]
    requests: list[RequestRecord]
    outputs: list[list[int]]

    @property
    def num_output_tokens(self) -> int:
        return sum(map(len, self.outputs))

    @property
    def captured_share(self) -> float:
        """Share of the steps that replayed a captured graph."""
        return sum(step.graph_size > 0 for step in self.steps) / len(self.steps)

    @property
    def overlapped_share(self) -> float:
        """Share of the steps that were planned before the step ahead of them had ended."""
        pairs = zip(self.steps, self.steps[1:])
        return sum(later.started_ns < step.ended_ns for step, later in pairs) / len(self.steps)


@dataclass
class Collected:
    """What an engine's steps gave: as cheap as any reader, because the clock is running."""

    steps: list[StepRecord] = field(default_factory=list)
    requests: dict[str, RequestRecord] = field(default_factory=dict)  # that ended, by id
    tokens: dict[str, list[int]] = field(default_factory=dict)  # output tokens by request id

    def take(self, output: StepOutput) -> None:
        """Take in one step's output.

        Raises:
            AssertionError: the step, or a request, failed.
        """
        for delta in output.deltas:
            assert delta.error is None, delta.error
            self.tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
        if output.record is not None and output.record.rows:
            self.steps.append(output.record)
        for request in output.requests:
            self.requests[request.request_id] = request


def run_workload(
    engine: Engine,
    workload: Workload,
    *,
    loras: Sequence[str | None] | None = None,
    structured: StructuredOutputsParams | None = None,
    ends_at: float | None = None,
) -> Run:
    """Run all requests to their end. `loras`: the adapter of each; `structured`: what all outputs follow; `ends_at`: ``time.monotonic()`` at which to give up.

    Raises:
        OutOfTime: `ends_at` passed; the engine is idle again.
        AssertionError: a step failed, or a request got another number of tokens than it asked for.
    """
    began = time.perf_counter()
    requests = zip(workload.prompts, workload.output_tokens, loras or [None] * len(workload.prompts))
    names = [
        add(engine, prompt, count, workload.temperature, lora, structured) for prompt, count, lora in requests
    ]
    taken = Collected()
    while engine.has_work:
        taken.take(engine.step())
        if ends_at is not None and time.monotonic() > ends_at:
            drain(engine, names)
            raise OutOfTime(f"the budget ended while {workload.name} ran")
    seconds = time.perf_counter() - began
    outputs = [taken.tokens[name] for name in names]
    got = list(map(len, outputs))
    assert got == workload.output_tokens, f"{workload.name}: asked for {workload.output_tokens}, got {got}"
    return Run(seconds, taken.steps, [taken.requests[name] for name in names], outputs)


def add(
    engine: Engine,
    prompt: Sequence[int],
    output_tokens: int,
    temperature: float = 0.0,
    lora: str | None = None,
    structured: StructuredOutputsParams | None = None,
) -> str:
    """Queue one request; returns its id."""
    params = SamplingParams(
        max_tokens=output_tokens, temperature=temperature, ignore_eos=structured is None, structured_outputs=structured
    )  # fmt: skip
    request = engine.make_request(tuple(prompt), params, lora=lora)
    engine.add(request)
    return request.request_id


def drain(engine: Engine, request_ids: Iterable[str]) -> None:
    """Abort requests and step until the engine is idle."""
    for request_id in request_ids:
        engine.abort(request_id)
    while engine.has_work:
        engine.step()
