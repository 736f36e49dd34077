"""Evaluate one version: send a dataset's requests through a backend, score the answers, keep every row.

Every version gets the same requests with the same seeds (a function of the run's seed and the example's id, so that order and
concurrency do not matter), greedy by default, on a deterministic engine: two rows differ only if the weights do.

Boundary: requests and scores. Two versions are compared in `workbench.evals.compare`; rows are stored by
`workbench.evals.record`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from workbench.evals.datasets import Dataset, Example
from workbench.evals.errors import RequestsFailedError
from workbench.evals.scorers import (
    Answer,
    Metric,
    Scorer,
    ToolCall,
    apply_scorer,
    check_scorers,
    reference_text,
)

if TYPE_CHECKING:
    from engine import Completion, SamplingParams
    from workbench.backends.protocol import Backend

OnProgress = Callable[[float, str], None]
CheckCancelled = Callable[[], None]

_ROUNDS_PER_CHUNK = 4  # requests sent together, as a multiple of the concurrency: how often progress is told
_SPECIAL = re.compile(r"<\|[a-z_/]+\|>|</?s>")


@dataclass(frozen=True, slots=True)
class EvaluationOptions:
    """How requests are sent. `order_seed`: another order, and so other batches; the rows come back in the dataset's order."""

    max_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    max_concurrency: int = 16
    order_seed: int | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One example's answer and scores."""

    example_id: str
    scores: Mapping[str, float | None]
    output: str
    token_ids: tuple[int, ...]
    logprob: float  # of the whole answer, in nats
    finish_reason: str
    num_prompt_tokens: int
    prompt_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One version's rows, in the dataset's order."""

    version: str
    model_id: str
    dataset: Dataset
    metrics: tuple[Metric, ...]
    options: EvaluationOptions
    rows: tuple[Row, ...]
    backend: str = ""

    def mean(self, metric: str) -> float | None:
        """The metric's mean over the scored examples; None when there is none."""
        values = [v for row in self.rows if (v := row.scores[metric]) is not None]
        return math.fsum(values) / len(values) if values else None

    def means(self) -> dict[str, float]:
        found = {metric.name: self.mean(metric.name) for metric in self.metrics}
        return {name: value for name, value in found.items() if value is not None}


def evaluate(
    backend: Backend,
    model_id: str,
    dataset: Dataset,
    scorers: Sequence[Scorer],
    options: EvaluationOptions | None = None,
    *,
    version: str | None = None,
    on_progress: OnProgress | None = None,
    check_cancelled: CheckCancelled | None = None,
) -> Evaluation:
    """Answer and score the whole dataset with the resident model `model_id`.

    Raises:
        ScorerError: a scorer that does not fit the dataset (before any request), or that fails on an answer.
        RequestsFailedError: a request failed; a comparison of the others would be biased.
        InvalidRequestError: a request that can never run on this model.
    """
    options = options or EvaluationOptions()
    check_scorers(scorers, dataset)
    order = _order(dataset, options)
    completions: dict[str, Completion] = {}
    size = max(1, options.max_concurrency * _ROUNDS_PER_CHUNK)
    for start in range(0, len(order), size):
        if check_cancelled is not None:
            check_cancelled()
        chunk = order[start : start + size]
        completions.update(_answers(backend, model_id, chunk, options))
        if on_progress is not None:
            done = start + len(chunk)
            on_progress(done / len(order), f"{version or model_id}: {done} of {len(order)} answers")
    references = (
        _reference_logprobs(backend, model_id, dataset, completions)
        if any(scorer.needs_reference for scorer in scorers)
        else {}
    )
    rows = tuple(
        _row(example, completions[example.id], references.get(example.id), scorers)
        for example in dataset.examples
    )
    metrics = tuple(scorer.metric for scorer in scorers)
    return Evaluation(version or model_id, model_id, dataset, metrics, options, rows, backend.name)


def request_params(example: Example, options: EvaluationOptions) -> SamplingParams:
    """How this example is sampled: the same for every version."""
    from engine import SamplingParams

    return SamplingParams(
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        seed=example_seed(options.seed, example.id),
        logprobs=0,
        skip_special_tokens=not example.tools,  # calls are found by their markers
    )


def example_seed(seed: int, example_id: str) -> int:
    """The seed of one request, whatever its place in the run."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{example_id}".encode()).digest()[:7], "big")


def as_answer(
    text: str, *, has_tools: bool, token_ids: tuple[int, ...] = (), finish_reason: str = "stop",
    reference_logprobs: tuple[float, ...] | None = None,
) -> Answer:  # fmt: skip
    """What scorers see of an output: its text, and its tool calls where the request had tools."""
    calls: list[ToolCall] = []
    if has_tools:
        text, calls = _split_calls(text)
    return Answer(text, token_ids, finish_reason, tuple(calls), reference_logprobs)


def _split_calls(text: str) -> tuple[str, list[ToolCall]]:
    from workbench.chat_output import OutputSyntax, gather
    from workbench.chat_output.formats import CALL_FORMATS, formats_in

    calls: list[ToolCall] = []
    for name in formats_in(text):
        parser = OutputSyntax(CALL_FORMATS[name]).parser()
        found = gather(parser.push(text) + parser.finish())
        text = found.content
        calls += [ToolCall(call.name, json.loads(call.arguments)) for call in found.calls]
    return _SPECIAL.sub("", text), calls


def _order(dataset: Dataset, options: EvaluationOptions) -> list[Example]:
    if options.order_seed is None:
        return list(dataset.examples)
    key = options.order_seed
    return sorted(dataset.examples, key=lambda e: hashlib.sha256(f"{key}/{e.id}".encode()).digest())


def _answers(
    backend: Backend, model_id: str, examples: Sequence[Example], options: EvaluationOptions
) -> dict[str, Completion]:
    """Completions by example id; examples with the same tools travel together, since a call has one list of tools."""
    by_tools: dict[str, list[Example]] = {}
    for example in examples:
        by_tools.setdefault(json.dumps(example.tools, sort_keys=True), []).append(example)
    answers: dict[str, Completion] = {}
    for group in by_tools.values():
        tools = group[0].tools
        completions = backend.chat(
            [list(example.messages) for example in group],
            [request_params(example, options) for example in group],
            model=model_id,
            tools=list(tools) or None,
            max_concurrency=options.max_concurrency,
        )
        answers.update({example.id: c for example, c in zip(group, completions, strict=True)})
    failed = [(name, c.error) for name, c in answers.items() if c.error]
    if failed:
        raise RequestsFailedError(
            f"{len(failed)} of {len(answers)} requests to {model_id} failed, the first ({failed[0][0]}): {failed[0][1]}",
            value=failed[0][0], remedy="See the engine's log, then run it again.",
        )  # fmt: skip
    return answers


def _reference_logprobs(
    backend: Backend, model_id: str, dataset: Dataset, completions: Mapping[str, Completion]
) -> dict[str, tuple[float, ...]]:
    """Log-probabilities of the expected answers' tokens, each after its own prompt.

    The answer's tokens come from scoring it alone; a token that the tokenizer puts before every text (BOS) is dropped.
    """
    texts = [reference_text(example) for example in dataset.examples]
    alone = backend.score(texts, model=model_id)
    prompts: list[list[int]] = []
    lengths: list[int] = []
    for example, score in zip(dataset.examples, alone, strict=True):
        prompt = completions[example.id].prompt_token_ids
        answer = score.token_ids[1:] if score.token_ids[:1] == prompt[:1] else score.token_ids
        prompts.append([*prompt, *answer])
        lengths.append(len(answer))
    scores = backend.score(prompts, model=model_id)
    return {
        example.id: score.logprobs[len(score.logprobs) - length :]
        for example, score, length in zip(dataset.examples, scores, lengths, strict=True)
    }


def _row(
    example: Example,
    completion: Completion,
    reference_logprobs: tuple[float, ...] | None,
    scorers: Sequence[Scorer],
) -> Row:
    answer = as_answer(
        completion.text, has_tools=bool(example.tools), token_ids=completion.token_ids,
        finish_reason=completion.finish_reason.value, reference_logprobs=reference_logprobs,
    )  # fmt: skip
    return Row(
        example.id,
        {scorer.metric.name: apply_scorer(scorer, example, answer) for scorer in scorers},
        completion.text,
        completion.token_ids,
        math.fsum(entry.logprob for entry in completion.logprobs),
        completion.finish_reason.value,
        completion.num_prompt_tokens,
        completion.prompt_token_ids,
    )


@dataclass(frozen=True, slots=True)
class Repeatability:
    """Whether requests that ran again in another batch gave the same tokens and log-probabilities, bit for bit."""

    checked: int
    equal: int
    differing: tuple[str, ...] = field(default=())

    @property
    def proven(self) -> bool:
        return self.checked > 0 and self.equal == self.checked

    def to_dict(self) -> dict[str, Any]:
        return {"checked": self.checked, "equal": self.equal, "differing": list(self.differing)}


def check_repeatable(
    backend: Backend, evaluation: Evaluation, *, requests: int = 16, max_concurrency: int = 3
) -> Repeatability:
    """Run some requests again in another order and batch size, and compare them with their rows bit by bit."""
    chosen = evaluation.dataset.sample(requests)
    options = EvaluationOptions(
        evaluation.options.max_tokens, evaluation.options.temperature, evaluation.options.seed, max_concurrency,
        order_seed=1,
    )  # fmt: skip
    again = evaluate(backend, evaluation.model_id, chosen, [], options)
    rows = {row.example_id: row for row in evaluation.rows}
    differing = tuple(
        row.example_id
        for row in again.rows
        if (row.token_ids, row.logprob) != (rows[row.example_id].token_ids, rows[row.example_id].logprob)
    )
    return Repeatability(len(again.rows), len(again.rows) - len(differing), differing)
