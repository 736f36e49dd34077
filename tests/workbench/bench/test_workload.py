"""Specs, plans and traces: fixed before the run, the same for the same seed, and refused when they make no sense."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.bench.errors import BenchmarkError, TraceError
from workbench.bench.spec import parse
from workbench.bench.workload import (
    WordCosts,
    from_dataset,
    from_trace,
    poisson_times,
    read_conversations,
    read_trace,
    synthetic,
)

COSTS = WordCosts("of", 5, ("the", "house", "incredible"), (1, 2, 4))
WIDE = WordCosts("of", 9, ("aa", "bbbb"), (3, 5))


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        ({"requests": 0}, "requests"),
        ({"concurrency": 0}, "concurrency"),
        ({"rate": 0}, "rate"),
        ({"rate": -1}, "rate"),
        ({"rate": float("nan")}, "rate"),
        ({"input_tokens": 0}, "input_tokens"),
        ({"output_tokens": "many"}, "output_tokens"),
        ({"concurency": 4}, "concurency"),
        ({"seed": -1}, "seed"),
        ({"slo": {"ttft": 3}}, "slo.ttft"),
        ({"concurrency": 4, "rate": 2}, None),
        ({"dataset": "a", "trace": "b"}, None),
        ({"trace": "b", "rate": 2}, None),
        ({"url": "localhost:8501"}, None),
    ],
)  # fmt: skip
def test_a_spec_that_cannot_run_is_refused_by_name(raw, param):
    with pytest.raises(BenchmarkError) as refused:
        parse(raw)
    assert refused.value.param == param


def test_a_spec_survives_json():
    spec = parse({"rate": 2.5, "requests": 7, "slo": {"ttft_ms": 200}})
    assert parse(json.loads(json.dumps(spec.as_dict()))) == spec
    assert spec.closed_loop is None
    assert parse({}).closed_loop == 8


def test_arrivals_are_a_poisson_process():
    """Gaps of 20,000 arrivals: mean and standard deviation 1/rate, no correlation, exponential quantiles."""
    times = np.asarray(poisson_times(4.0, 20_001, seed=1))
    gaps = np.diff(times)
    assert times[0] == 0
    assert gaps.mean() == pytest.approx(0.25, rel=0.03)
    assert gaps.std() == pytest.approx(0.25, rel=0.04)
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 0.03
    assert np.percentile(gaps, 90) == pytest.approx(0.25 * np.log(10), rel=0.05)


def test_the_plan_is_the_seeds():
    spec = parse({"rate": 5, "requests": 20, "seed": 3})
    one, same = synthetic(spec, COSTS), synthetic(spec, COSTS)
    other = synthetic(parse({"rate": 5, "requests": 20, "seed": 4}), COSTS)
    assert one == same
    assert one.digest == same.digest
    assert one.digest != other.digest
    assert [r.at_s for r in one.measured] != [r.at_s for r in other.measured]
    assert all(r.at_s is None and r.is_warmup for r in one.warmup)
    assert (
        len({r.messages[0]["content"] for r in one.measured}) == 20
    )  # no prompt is another's prefix-cache hit


@given(st.integers(1, 3000), st.integers(0, 5))
def test_prompts_have_the_length_that_was_asked_for(num_tokens, seed):
    generator = np.random.default_rng(seed)
    for costs, short in ((COSTS, 0), (WIDE, 2)):
        words = costs.prompt(num_tokens, generator).split(" ")
        cost = dict(zip(costs.words, costs.tokens, strict=True))
        tokens = costs.lead_tokens + sum(cost[word] for word in words[1:])
        assert words[0] == costs.lead
        assert tokens in range(num_tokens - short, num_tokens + 1) or num_tokens <= costs.lead_tokens + short


def test_a_trace_keeps_its_times_and_lengths(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("arrival_s,input_tokens,output_tokens\n10.5,20,3\n10.0,30,4\n12.0,8,1\n")
    rows = read_trace(path)
    workload = from_trace(parse({"trace": str(path), "requests": 10, "trace_speed": 2}), COSTS, rows)
    assert [(r.at_s, r.asked_input_tokens, r.max_tokens) for r in workload.measured] == [
        (0.0, 30, 4),
        (0.25, 20, 3),
        (1.0, 8, 1),
    ]
    assert workload.offered_rps == pytest.approx(2.0)
    closed = from_trace(parse({"trace": str(path), "concurrency": 2}), COSTS, rows)
    assert closed.concurrency == 2
    assert {r.at_s for r in closed.measured} == {None}


def test_a_trace_of_times_of_day_is_read(tmp_path):
    path = tmp_path / "azure.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,374,44\n2023-11-16 18:17:04.5000000,396,109\n"
    )
    first, second = read_trace(path)
    assert (first.arrival_s, first.input_tokens, first.output_tokens) == (0.0, 374, 44)
    assert second.arrival_s == pytest.approx(0.52004, abs=1e-5)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("", "no column"),
        ("arrival_s,input_tokens\n1,2\n", "no column output_tokens"),
        ("arrival_s,input_tokens,output_tokens\n", "no requests"),
        ("arrival_s,input_tokens,output_tokens\n0,5,5\nsoon,5,5\n", "line 3"),
        ("arrival_s,input_tokens,output_tokens\n0,0,5\n", "at least 1"),
        ("arrival_s,input_tokens,output_tokens\nnan,1,5\n", "finite"),
        ("arrival_s,input_tokens,output_tokens\n0,1\n", "line 2"),
    ],
)
def test_a_bad_trace_is_refused_with_its_line(tmp_path, content, word):
    path = tmp_path / "t.csv"
    path.write_text(content)
    with pytest.raises(TraceError, match=word):
        read_trace(path)


def test_a_dataset_is_shuffled_by_the_seed_and_used_again(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(
        "\n".join(json.dumps({"messages": [{"role": "user", "content": str(number)}]}) for number in range(5))
        + '\n{"prompt": "5"}\n\n'
    )
    conversations = read_conversations(path)
    spec = parse({"dataset": str(path), "requests": 12, "warmup": 0, "seed": 1})
    contents = [r.messages[0]["content"] for r in from_dataset(spec, conversations).measured]
    assert sorted(contents) == sorted([str(number) for number in range(6)] * 2)
    assert contents[:6] != [str(number) for number in range(6)]
    assert not from_dataset(spec, conversations).forced_length


@pytest.mark.parametrize(
    "line", ["{", "[1]", '{"text": "x"}', '{"messages": []}', '{"messages": ["x"]}', '{"messages": 3}']
)
def test_a_bad_dataset_line_is_named(tmp_path, line):
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(BenchmarkError, match="line 2"):
        read_conversations(path)
