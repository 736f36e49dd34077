"""A request's tokens do not depend on how it was scheduled.

In float64 the tokens are the same; in deterministic mode, in float32, the log-probabilities are the same to the bit. Each
case asserts from the step records that what it is about did happen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from engine.sampling_params import SamplingParams

OUTPUT = 24
GREEDY = SamplingParams(max_tokens=OUTPUT, temperature=0.0, ignore_eos=True, logprobs=3)
DRAWN = SamplingParams(
    max_tokens=OUTPUT, temperature=0.9, top_k=30, top_p=0.95, seed=11, ignore_eos=True, logprobs=3
)
CONTROLLED = DRAWN.with_(
    repetition_penalty=1.2, frequency_penalty=0.3, presence_penalty=0.4, logit_bias={6: 1.5, 8: -2.0},
    bad_words=((4,), (40, 42)), allowed_token_ids=tuple(range(0, 90, 2)),
)  # fmt: skip
Prompts = Callable[..., list[int]]
Engine = Callable[..., Any]
Models = Callable[[str], Any]


@pytest.fixture(scope="module", params=["mistral_window", "llama3_gqa_tied"])
def alone(request: pytest.FixtureRequest, tiny_models: Models, prompt_of: Prompts, run_engine: Engine) -> Any:
    """A model, a prompt, and its tokens when it has the engine to itself, greedy and drawn."""
    tiny, prompt = tiny_models(request.param), prompt_of(66, 3)
    runs = {
        name: run_engine(tiny.folder, {"x": prompt}, params)
        for name, params in (("greedy", GREEDY), ("drawn", DRAWN))
    }
    assert runs["greedy"].steps_of("x")[0] == 66, "the prompt went in one piece"
    tokens = {name: run.tokens["x"] for name, run in runs.items()}
    assert tokens["greedy"] != tokens["drawn"]
    return tiny, prompt, tokens


@pytest.mark.parametrize("block_size", [1, 8, 16, 64])
def test_block_sizes(alone: Any, run_engine: Engine, block_size: int) -> None:
    tiny, prompt, tokens = alone
    run = run_engine(tiny.folder, {"x": prompt}, GREEDY, block_size=block_size, num_blocks=1024 // block_size)
    taken = {i for r in run.records for event in r.block_events for i in event.block_ids}
    assert len(taken) == -(-(66 + OUTPUT - 1) // block_size)
    assert run.tokens["x"] == tokens["greedy"]


@pytest.mark.parametrize("chunk", [1, 7, 32])
def test_chunk_sizes(alone: Any, run_engine: Engine, chunk: int) -> None:
    tiny, prompt, tokens = alone
    run = run_engine(tiny.folder, {"x": prompt}, GREEDY, max_batched_tokens=chunk)
    steps = run.steps_of("x")
    assert max(steps) == chunk
    assert len(steps) == -(-66 // chunk) + OUTPUT - 1
    assert run.tokens["x"] == tokens["greedy"]


@pytest.mark.parametrize("kind", ["greedy", "drawn"])
def test_prefix_hits(alone: Any, prompt_of: Prompts, run_engine: Engine, kind: str) -> None:
    tiny, prompt, tokens = alone
    params = GREEDY if kind == "greedy" else DRAWN
    prompts = {"first": prompt, "other": prompt[:50] + prompt_of(9), "x": prompt}
    run = run_engine(tiny.folder, prompts, params, arrive_at={"other": 3, "x": 8})
    # x shares all but the last, partial block with "first": 66 tokens are 16 full blocks of 4.
    assert run.prefix_hits == {"other": 48, "x": 64}
    assert run.steps_of("x")[0] == 2
    assert run.tokens["first"] == run.tokens["x"] == tokens[kind]


@pytest.mark.parametrize("kind", ["greedy", "drawn"])
def test_preemption(alone: Any, prompt_of: Prompts, run_engine: Engine, kind: str) -> None:
    tiny, prompt, tokens = alone
    params = GREEDY if kind == "greedy" else DRAWN
    prompts = {"a": prompt_of(70, 5), "b": prompt_of(62, 6), "x": prompt}
    run = run_engine(
        tiny.folder, prompts, params, num_blocks=60, max_model_len=110, enable_prefix_cache=False
    )
    assert "x" in run.preempted
    assert sum(run.steps_of("x")) > 66 + OUTPUT - 1, (
        "what was computed before the preemption was computed again"
    )
    assert run.tokens["x"] == tokens[kind]


@pytest.mark.parametrize("kind", ["greedy", "drawn"])
def test_batch_mix(alone: Any, prompt_of: Prompts, run_engine: Engine, kind: str) -> None:
    tiny, prompt, tokens = alone
    prompts = {f"n{i}": prompt_of(5 + 11 * i, i) for i in range(7)} | {"x": prompt}
    params = {f"n{i}": DRAWN.with_(seed=i, temperature=0.3 * i, top_k=i) for i in range(7)}
    params["x"] = GREEDY if kind == "greedy" else DRAWN
    run = run_engine(
        tiny.folder, prompts, params, arrive_at={"x": 4, "n3": 9, "n5": 11, "n6": 12}, max_batched_tokens=24
    )
    mixed = [r for r in run.records if len(r.rows) > 1 and ("x", 1) in r.rows and r.num_prefill_tokens]
    assert mixed, "x decoded beside another request's prefill"
    assert any(len(r.rows) == 8 for r in run.records)
    assert run.tokens["x"] == tokens[kind]


def same_bits(found: list[Any], expected: list[Any]) -> None:
    """TokenLogprobs compare as floats, so equal means equal to the bit."""
    assert [e.token_id for e in found] == [e.token_id for e in expected]
    assert found == expected


DETERMINISTIC = {"dtype": "float32", "deterministic": True, "block_size": 8}


@pytest.fixture(scope="module", params=[("reference", 1), ("cpu", 2)], ids=["reference", "cpu"])
def needle(
    request: pytest.FixtureRequest, tiny_models: Models, prompt_of: Prompts, run_engine: Engine
) -> Any:
    """One request with all controls, alone in deterministic mode; its prompt's log-probabilities are asked for too."""
    backend, num_threads = request.param
    if backend == "cpu":
        from engine.kernels.cpu_library import unavailable_reason

        if unavailable_reason() is not None:
            pytest.skip(f"no compiled CPU kernel: {unavailable_reason()}")
    tiny, prompt = tiny_models("wide_llama"), prompt_of(66, 3)
    settings = {**DETERMINISTIC, "attention_backend": backend, "num_threads": num_threads}
    params = CONTROLLED.with_(prompt_logprobs=4)
    run = run_engine(tiny.folder, {"x": prompt}, params, **settings)
    assert set(run.tokens["x"]) <= {token for token in range(0, 90, 2) if token != 4}
    return tiny, prompt, params, settings, run


@pytest.mark.parametrize(
    "settings", [{"max_batched_tokens": 7}, {"max_batched_tokens": 33}, {"block_size": 16}]
)
def test_bits_across_chunks_and_blocks(needle: Any, run_engine: Engine, settings: dict[str, int]) -> None:
    tiny, prompt, params, base, expected = needle
    run = run_engine(tiny.folder, {"x": prompt}, params, **{**base, **settings})
    assert (len(run.steps_of("x")) > len(expected.steps_of("x"))) == ("max_batched_tokens" in settings)
    same_bits(run.logprobs["x"], expected.logprobs["x"])
    same_bits(run.prompt_logprobs["x"], expected.prompt_logprobs["x"])


def test_bits_across_prefix_hits(needle: Any, prompt_of: Prompts, run_engine: Engine) -> None:
    tiny, prompt, params, base, expected = needle
    params = params.with_(prompt_logprobs=None)  # a request for them computes its whole prompt
    prompts = {"first": prompt, "other": prompt[:40] + prompt_of(9), "x": prompt}
    run = run_engine(tiny.folder, prompts, params, arrive_at={"other": 3, "x": 9}, **base)
    assert run.prefix_hits == {"other": 40, "x": 64}
    for name in ("first", "x"):
        same_bits(run.logprobs[name], expected.logprobs["x"])


def test_bits_across_preemption(needle: Any, prompt_of: Prompts, run_engine: Engine) -> None:
    tiny, prompt, params, base, expected = needle
    prompts = {"a": prompt_of(70, 5), "b": prompt_of(62, 6), "x": prompt}
    base = {**base, "num_blocks": 29, "max_model_len": 110, "enable_prefix_cache": False}
    run = run_engine(tiny.folder, prompts, params, **base)
    assert "x" in run.preempted
    same_bits(run.logprobs["x"], expected.logprobs["x"])


def test_bits_across_batch_mixes(needle: Any, prompt_of: Prompts, run_engine: Engine) -> None:
    tiny, prompt, params, base, expected = needle
    prompts = {f"n{i}": prompt_of(5 + 11 * i, i) for i in range(9)} | {"x": prompt}
    every = {name: params.with_(seed=i, temperature=0.2 * i) for i, name in enumerate(prompts)} | {
        "x": params
    }
    run = run_engine(
        tiny.folder, prompts, every, arrive_at={"x": 2, "n3": 9, "n6": 12}, max_batched_tokens=40, **base
    )
    assert any(len(r.rows) > 1 and ("x", 1) in r.rows and r.num_prefill_tokens for r in run.records)
    assert len({len(r.rows) for r in run.records if any(name == "x" for name, _ in r.rows)}) > 3
    same_bits(run.logprobs["x"], expected.logprobs["x"])
    same_bits(run.prompt_logprobs["x"], expected.prompt_logprobs["x"])
