"""Scorers: how good one answer is, as a number, by comparing it with what the example expects.

    exact_match       the answer is the expected text, or the expected JSON value                              0 or 1
    json_valid        the answer is one JSON object or list                                                    0 or 1
    field_f1          F1 of the fields (path and value) of the expected JSON object                            0 to 1
    contains          the expected text, or each of the expected texts, is in the answer; contains:TEXT        0 or 1
    regex             the expected pattern is found in the answer; regex:PATTERN                               0 or 1
    tool_call_match   the calls are the expected ones, in order: {"name": …, "arguments": {…}} or a list       0 or 1
    perplexity        of the expected answer after the example's messages; lower is better                     1 to ∞
    python:FILE:FUNC  ``FUNC(example, answer) -> float | bool | None`` of a file of one's own                  0 to 1

None is "not scored": the example counts for neither version. A function's scores lie between 0 and 1 unless it carries
``bounded = False``; ``higher_is_better = False`` turns their meaning around.

Boundary: pure functions of an example and an answer. Which requests are sent is `workbench.evals.evaluate`'s.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from workbench.evals.datasets import Dataset, Example
from workbench.evals.errors import ScorerError, UnknownScorerError


@dataclass(frozen=True, slots=True)
class ToolCall:
    name: str
    arguments: Any  # parsed


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer as scorers see it."""

    text: str  # without tool calls
    token_ids: tuple[int, ...] = ()
    finish_reason: str = "stop"
    tool_calls: tuple[ToolCall, ...] = ()
    # Of the expected answer's tokens, where a scorer asked.
    reference_logprobs: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Metric:
    """What a score means, for statistics and pages."""

    name: str
    higher_is_better: bool = True
    bound: float | None = 1.0  # the largest possible difference of two scores; None: unbounded

    def gain(self, difference: float) -> float:
        """The difference, counted so that more is better."""
        return difference if self.higher_is_better else -difference


class Scorer(Protocol):
    """Gives an answer its number."""

    @property
    def metric(self) -> Metric: ...

    @property
    def needs_reference(self) -> bool:
        """Whether the expected answer's log-probabilities must be computed."""
        ...

    def check(self, example: Example) -> str | None:
        """What the example lacks for this scorer; None when it can be scored."""
        ...

    def score(self, example: Example, answer: Answer) -> float | None: ...


@dataclass(frozen=True, slots=True)
class FunctionScorer:
    """A scorer of two functions."""

    metric: Metric
    function: Callable[[Example, Answer], float | bool | None]
    lacks: Callable[[Example], str | None] = lambda _example: None
    needs_reference: bool = False

    def check(self, example: Example) -> str | None:
        return self.lacks(example)

    def score(self, example: Example, answer: Answer) -> float | None:
        value = self.function(example, answer)
        return None if value is None else float(value)


# ── the functions ───────────────────────────────────────────────────────────────────────────────────────────────────────


def exact_match(example: Example, answer: Answer) -> bool:
    """White space around a text and the order of an object's keys do not count."""
    if isinstance(example.expected, str):
        return answer.text.strip() == example.expected.strip()
    value = _parsed(answer.text)
    return value is not _BROKEN and _same(value, example.expected)


def json_valid(_example: Example, answer: Answer) -> bool:
    return isinstance(_parsed(answer.text), dict | list)


def field_f1(example: Example, answer: Answer) -> float:
    """Each field is a path with its value; a field is right only with the right value. No JSON: 0."""
    value = _parsed(answer.text)
    if not isinstance(value, dict):
        return 0.0
    found, wanted = Counter(_fields(value)), Counter(_fields(example.expected))
    total = found.total() + wanted.total()
    return 2 * (found & wanted).total() / total if total else 1.0


def contains(example: Example, answer: Answer) -> bool:
    wanted = [example.expected] if isinstance(example.expected, str) else example.expected
    return all(text in answer.text for text in wanted)


def regex(example: Example, answer: Answer) -> bool:
    return re.search(example.expected, answer.text) is not None


def tool_call_match(example: Example, answer: Answer) -> bool:
    """Names and arguments are the expected ones, in order, no call more. An expected empty list means: no call."""
    wanted = example.expected if isinstance(example.expected, list) else [example.expected]
    found = [{"name": call.name, "arguments": call.arguments} for call in answer.tool_calls]
    return _same(found, [{"name": w["name"], "arguments": w.get("arguments", {})} for w in wanted])


def perplexity(_example: Example, answer: Answer) -> float | None:
    """Per token of the expected answer, natural for the model: exp of its mean negative log-probability."""
    if not answer.reference_logprobs:
        return None
    mean = -math.fsum(answer.reference_logprobs) / len(answer.reference_logprobs)
    return math.exp(min(mean, 700.0))


def reference_text(example: Example) -> str:
    """The expected answer as a model would write it: a text, or JSON on one line."""
    if isinstance(example.expected, str):
        return example.expected
    return json.dumps(example.expected, ensure_ascii=False, separators=(",", ":"))


def _lacks_expected(example: Example) -> str | None:
    return "has no `expected`" if example.expected is None else None


def _lacks_object(example: Example) -> str | None:
    return None if isinstance(example.expected, dict) else "has no JSON object in `expected`"


def _lacks_texts(example: Example) -> str | None:
    if isinstance(example.expected, str):
        return None
    fits = isinstance(example.expected, list) and all(isinstance(text, str) for text in example.expected)
    return None if fits and example.expected else "has no text or list of texts in `expected`"


def _lacks_pattern(example: Example) -> str | None:
    if not isinstance(example.expected, str):
        return "has no pattern in `expected`"
    return _broken_pattern(example.expected)


def _lacks_calls(example: Example) -> str | None:
    calls = example.expected if isinstance(example.expected, list) else [example.expected]
    fits = all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls)
    return None if fits else 'has no {"name": …, "arguments": {…}} in `expected`'


def _broken_pattern(pattern: str) -> str | None:
    try:
        re.compile(pattern)
    except re.error as error:
        return f"has a broken pattern: {error}"
    return None


# ── by name ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

SCORERS: dict[str, FunctionScorer] = {
    scorer.metric.name: scorer
    for scorer in (
        FunctionScorer(Metric("exact_match"), exact_match, _lacks_expected),
        FunctionScorer(Metric("json_valid"), json_valid),
        FunctionScorer(Metric("field_f1"), field_f1, _lacks_object),
        FunctionScorer(Metric("contains"), contains, _lacks_texts),
        FunctionScorer(Metric("regex"), regex, _lacks_pattern),
        FunctionScorer(Metric("tool_call_match"), tool_call_match, _lacks_calls),
        FunctionScorer(
            Metric("perplexity", higher_is_better=False, bound=None), perplexity, _lacks_expected, True
        ),
    )
}


def make_scorer(name: str) -> Scorer:
    """The scorer of that name; `contains:TEXT`, `regex:PATTERN` and `python:FILE:FUNC` carry their own argument.

    Raises:
        UnknownScorerError: naming those that exist.
        ScorerError: a broken pattern; a file or function that is not there or cannot be imported.
    """
    kind, _, argument = name.partition(":")
    if name in SCORERS:
        return SCORERS[name]
    if kind == "contains" and argument:
        return FunctionScorer(Metric(name), lambda _example, answer: argument in answer.text)
    if kind == "regex" and argument:
        broken = _broken_pattern(argument)
        if broken:
            raise ScorerError(f"the scorer {name!r} {broken}", value=argument, param="scorers")
        pattern = re.compile(argument)
        return FunctionScorer(Metric(name), lambda _example, answer: pattern.search(answer.text) is not None)
    if kind == "python" and argument.count(":") >= 1:
        return _python_scorer(*argument.rsplit(":", 1))
    known = [*SCORERS, "contains:TEXT", "regex:PATTERN", "python:FILE:FUNC"]
    raise UnknownScorerError(
        f"there is no scorer {name!r}", value=name, limit=known, param="scorers",
        remedy=f"Scorers: {', '.join(known)}.",
    )  # fmt: skip


def make_scorers(names: Sequence[str]) -> list[Scorer]:
    """`make_scorer` of each name, once each. Raises as it does."""
    scorers = {name: make_scorer(name) for name in names}
    return list({scorer.metric.name: scorer for scorer in scorers.values()}.values())


def default_scorers(dataset: Dataset) -> list[str]:
    """Scorers that every example of the dataset can be scored by, the strictest first."""
    candidates = ["exact_match"]
    if any(example.tools for example in dataset.examples):
        candidates = ["tool_call_match"]
    elif all(isinstance(example.expected, dict) for example in dataset.examples):
        candidates = ["exact_match", "field_f1", "json_valid"]
    return [name for name in candidates if not any(SCORERS[name].check(e) for e in dataset.examples)]


def check_scorers(scorers: Sequence[Scorer], dataset: Dataset) -> None:
    """Raise ScorerError for the first example that a scorer cannot score: before any request is sent."""
    for scorer in scorers:
        for example in dataset.examples:
            lack = scorer.check(example)
            if lack:
                raise ScorerError(
                    f"{scorer.metric.name} cannot score example {example.id!r} of {dataset.name}: it {lack}",
                    value=example.id, param="scorers", remedy="Take another scorer, or complete the dataset.",
                )  # fmt: skip


def apply_scorer(scorer: Scorer, example: Example, answer: Answer) -> float | None:
    """The score, checked. Raises ScorerError: naming scorer and example."""
    name = scorer.metric.name
    try:
        value = scorer.score(example, answer)
    except Exception as error:  # people's own functions may raise anything
        raise ScorerError(
            f"scorer {name} failed on example {example.id!r}: {type(error).__name__}: {error}",
            value=example.id, param="scorers",
        ) from error  # fmt: skip
    if value is None:
        return None
    if not math.isfinite(value) or (scorer.metric.bound == 1.0 and not 0.0 <= value <= 1.0):
        raise ScorerError(
            f"scorer {name} gave {value!r} for example {example.id!r}", value=value, param="scorers",
            limit="a number between 0 and 1" if scorer.metric.bound else "a finite number",
            remedy="Scale it, or set `bounded = False` on the function." if scorer.metric.bound else None,
        )  # fmt: skip
    return float(
        f"{round(value, 9):.15g}"
    )  # what tables keep without loss: intervals can be recomputed from them exactly


def _python_scorer(file: str, function: str) -> Scorer:
    path = Path(file).expanduser()
    if not path.is_file():
        raise ScorerError(
            f"the scorer's file {file!r} does not exist", value=file, param="scorers",
            remedy="Write python:FILE:FUNC with the path of a Python file.",
        )  # fmt: skip
    spec = importlib.util.spec_from_file_location(f"quire_scorer_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses in it look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ScorerError(
            f"{file} cannot be imported: {type(error).__name__}: {error}", value=file, param="scorers"
        ) from error
    found = getattr(module, function, None)
    if not callable(found):
        raise ScorerError(
            f"{file} has no function {function!r}", value=function, param="scorers",
            limit=sorted(n for n, v in vars(module).items() if callable(v) and not n.startswith("_")),
        )  # fmt: skip
    bounded = bool(getattr(found, "bounded", True))
    metric = Metric(function, bool(getattr(found, "higher_is_better", True)), 1.0 if bounded else None)
    return FunctionScorer(metric, found)


# ── JSON ────────────────────────────────────────────────────────────────────────────────────────────────────────────────

_BROKEN = object()


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _BROKEN


def _same(a: Any, b: Any) -> bool:
    """Equal as JSON: 1 and 1.0 are, 1 and true are not."""
    return _canonical(a) == _canonical(b)


def _canonical(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(k)}:{_canonical(v)}" for k, v in sorted(value.items())) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_canonical, value)) + "]"
    return json.dumps(value)


def _fields(value: Any, path: str = "") -> Iterator[str]:
    """Each leaf as one text: its path and its value."""
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _fields(item, f"{path}/{name}")
    elif isinstance(value, list) and value:
        for item in value:
            yield from _fields(item, f"{path}[]")
    else:
        yield f"{path}={_canonical(value)}"
