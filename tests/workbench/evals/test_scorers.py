"""Scorers: what each counts as right, and that a scorer that cannot work says so by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from workbench.evals import errors, scorers
from workbench.evals.datasets import Dataset, Example, load_dataset
from workbench.evals.evaluate import as_answer

MESSAGES = ({"role": "user", "content": "q"},)


def example(expected: Any) -> Example:
    return Example("e1", MESSAGES, expected)


def score(name: str, expected: Any, text: str, **answer: Any) -> float | None:
    scorer = scorers.make_scorer(name)
    return scorers.apply_scorer(scorer, example(expected), scorers.Answer(text, **answer))


@pytest.mark.parametrize(
    ("name", "expected", "text", "wanted"),
    [
        ("exact_match", "yes", " yes\n", 1),
        ("exact_match", "yes", "Yes", 0),
        ("exact_match", {"a": 1, "b": None}, '{"b": null, "a": 1.0}', 1),
        ("exact_match", {"a": 1}, '{"a": true}', 0),
        ("exact_match", {"a": 1}, '{"a": 1} and more', 0),
        ("exact_match", [1, 2], "[2, 1]", 0),
        ("json_valid", None, '{"a": [1]}', 1),
        ("json_valid", None, "[]", 1),
        ("json_valid", None, "12", 0),
        ("json_valid", None, '{"a": 1', 0),
        ("field_f1", {"a": 1, "b": 2}, '{"a": 1, "b": 2}', 1),
        ("field_f1", {"a": 1, "b": 2}, '{"a": 1, "b": 3}', 0.5),
        ("field_f1", {"a": 1, "b": 2}, '{"a": 1}', 2 / 3),
        ("field_f1", {"a": {"x": 1, "y": 2}}, '{"a": {"x": 1, "y": 0}, "z": 9}', 0.4),
        ("field_f1", {"a": [1, 1, 2]}, '{"a": [1, 2, 2]}', 2 / 3),
        ("field_f1", {"a": 1}, "no json", 0),
        ("field_f1", {}, "{}", 1),
        ("contains", "sun", "the sun shines", 1),
        ("contains", ["sun", "moon"], "the sun shines", 0),
        ("contains:rain", None, "no rain", 1),
        ("regex", r"^\d+$", "123", 1),
        ("regex", r"^\d+$", "123a", 0),
        (r"regex:a.c", None, "xabcx", 1),
    ],
)  # fmt: skip
def test_scores(name: str, expected: Any, text: str, wanted: float) -> None:
    assert score(name, expected, text) == pytest.approx(wanted)


def test_tool_calls_are_read_from_the_models_markers_and_compared_as_values() -> None:
    call = {"name": "weather", "arguments": {"city": "Oslo"}}
    text = 'Let me see.<|tool_call|>{"name":"weather","arguments":{"city":"Oslo"}}<|/tool_call|><|end|>'
    answer = as_answer(text, has_tools=True)
    assert answer.text == "Let me see."
    scorer = scorers.make_scorer("tool_call_match")
    assert scorer.score(example(call), answer) == 1
    assert scorer.score(example([call, call]), answer) == 0
    assert scorer.score(example({**call, "arguments": {"city": "Rome"}}), answer) == 0
    assert scorer.score(example([]), answer) == 0
    assert scorer.score(example([]), as_answer("No tool.", has_tools=True)) == 1
    hermes = as_answer(
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>', has_tools=True
    )
    assert scorer.score(example(call), hermes) == 1
    broken = as_answer('<tool_call>{"name": </tool_call>', has_tools=True)
    assert (broken.tool_calls, scorer.score(example(call), broken)) == ((), 0)


def test_perplexity_is_the_exponential_of_the_mean_loss() -> None:
    assert score("perplexity", "x", "", reference_logprobs=(-1.0, -3.0)) == pytest.approx(math.exp(2))
    assert score("perplexity", "x", "", reference_logprobs=(-1e6,)) == pytest.approx(math.exp(700))
    assert score("field_f1", {"a": 1, "b": 2}, '{"a": 1}') == 0.666666667  # nine decimals: no table loses any
    assert score("perplexity", "x", "") is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [("field_f1", "text"), ("exact_match", None), ("regex", "("), ("contains", {}), ("tool_call_match", "x"), ("contains", [])],
)  # fmt: skip
def test_a_scorer_that_does_not_fit_is_refused_with_the_example(name: str, expected: Any) -> None:
    dataset = Dataset("d", "0", (example(expected),))
    with pytest.raises(errors.ScorerError, match="'e1' of d: it has"):
        scorers.check_scorers([scorers.make_scorer(name)], dataset)


@pytest.mark.parametrize("name", ["exact", "python", "contains:", "f1"])
def test_unknown_scorers_name_those_that_exist(name: str) -> None:
    with pytest.raises(errors.UnknownScorerError, match="field_f1"):
        scorers.make_scorer(name)


def test_a_function_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def short(example, answer):\n    return len(answer.text) <= 3\n"
        "def length(example, answer):\n    return len(answer.text)\n"
        "length.bounded = False\nlength.higher_is_better = False\n"
        "def too_big(example, answer):\n    return 7\n"
        "def broken(example, answer):\n    return answer.nothing\n"
        "def skips(example, answer):\n    return None\n"
    )
    assert score(f"python:{file}:short", None, "abc") == 1
    length = scorers.make_scorer(f"python:{file}:length")
    assert length.metric == scorers.Metric("length", higher_is_better=False, bound=None)
    assert score(f"python:{file}:length", None, "abcd") == 4
    assert score(f"python:{file}:skips", None, "abcd") is None
    with pytest.raises(errors.ScorerError, match=r"too_big gave 7.0 for example 'e1'"):
        score(f"python:{file}:too_big", None, "")
    with pytest.raises(errors.ScorerError, match="broken failed on example 'e1': AttributeError"):
        score(f"python:{file}:broken", None, "")
    for bad in (f"python:{file}:nobody", f"python:{tmp_path}/none.py:f", "regex:("):
        with pytest.raises(errors.ScorerError):
            scorers.make_scorer(bad)
    (tmp_path / "bad.py").write_text("import nothing_like_this\n")
    with pytest.raises(errors.ScorerError, match="cannot be imported"):
        scorers.make_scorer(f"python:{tmp_path}/bad.py:f")


def test_default_scorers_fit_the_dataset(write_dataset: Callable[..., Path]) -> None:
    def of(**fields: Any) -> list[str]:
        return scorers.default_scorers(
            load_dataset(write_dataset([{"id": "a", "messages": list(MESSAGES), **fields}]))
        )

    tool = {"type": "function", "function": {"name": "f"}}
    assert of(expected={"a": 1}) == ["exact_match", "field_f1", "json_valid"]
    assert of(expected="x") == ["exact_match"]
    assert of(expected={"name": "f"}, tools=[tool]) == ["tool_call_match"]
    assert of() == []
