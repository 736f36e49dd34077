"""The internal routes' JSON: every value survives the wire bit by bit."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import InvalidParamsError
from engine.llm import Score
from engine.plan import TokenLogprobs
from engine.records import Completion, EngineStats, MemoryLedger, RequestRecord
from engine.request import FinishReason
from engine.sampling_params import SamplingParams
from engine.structured_outputs import StructuredOutputsParams
from engine.token_kl import TokenKL
from workbench.backends import codec

ids = st.lists(st.integers(0, 2**31), max_size=5).map(tuple)
logprob = st.floats(max_value=0.0, allow_nan=False)
entries = st.lists(
    st.builds(
        TokenLogprobs,
        st.integers(0, 100),
        logprob,
        st.integers(1, 9),
        ids,
        st.lists(logprob, max_size=3).map(tuple),
    ),
    max_size=3,
).map(tuple)
ms = st.none() | st.floats(0, 1e9)


def through_json(value: object) -> dict[str, object]:
    return dict(json.loads(json.dumps(value, allow_nan=False)))


@given(
    st.builds(
        Completion, request_id=st.text(), prompt_token_ids=ids, token_ids=ids, text=st.text(),
        finish_reason=st.sampled_from(FinishReason), stop_reason=st.none() | st.text() | st.integers(), logprobs=entries,
        prompt_logprobs=entries, num_cached_tokens=st.integers(0, 9), seed=st.integers(-(2**63), 2**63 - 1), ttft_ms=ms,
        tpot_ms=ms, e2e_ms=st.floats(0, 1e9), error=st.none() | st.text(),
    )
)  # fmt: skip
def test_completions(completion: Completion) -> None:
    assert codec.completion_from_json(through_json(codec.completion_to_json(completion))) == completion


@given(
    st.builds(
        SamplingParams, max_tokens=st.none() | st.integers(9, 99), temperature=st.floats(0, 100), top_k=st.integers(0, 9),
        top_p=st.floats(0.1, 1), typical_p=st.floats(0.1, 1), best_of=st.none() | st.just(16), seed=st.none() | st.integers(-(2**63), 2**63 - 1), min_tokens=st.integers(0, 9),
        stop=st.lists(st.text(min_size=1), max_size=3).map(tuple), stop_token_ids=ids, ignore_eos=st.booleans(),
        logprobs=st.none() | st.integers(0, 20), prompt_logprobs=st.none() | st.integers(0, 20), n=st.integers(1, 16),
        presence_penalty=st.floats(-2, 2), frequency_penalty=st.floats(-2, 2), repetition_penalty=st.floats(0.1, 9),
        logit_bias=st.none() | st.dictionaries(st.integers(0, 99), st.floats(-100, 100), max_size=3),
        bad_words=st.lists(st.just("no") | st.just((1, 2)), max_size=3).map(tuple),
        allowed_token_ids=st.none() | st.just((1, 2)),
        structured_outputs=st.none() | st.just(StructuredOutputsParams(choice=("a", "b")))
        | st.just(StructuredOutputsParams(json={"type": "object"}, any_whitespace=False)),
    )
)  # fmt: skip
def test_params(params: SamplingParams) -> None:
    assert codec.params_from_json(through_json(codec.params_to_json(params))) == params


def test_an_unknown_param_is_refused() -> None:
    with pytest.raises(InvalidParamsError, match="temprature"):
        codec.params_from_json({"temprature": 1})


def test_divergences_with_an_impossible_token() -> None:
    one = TokenKL((1, 2, 3), (0.1, math.inf), (-0.5, -0.25), (-0.125, -math.inf), (True, False))
    assert codec.token_kl_from_json(through_json(codec.token_kl_to_json(one))) == one


def test_whole_rows_do_not_travel() -> None:
    with pytest.raises(InvalidParamsError, match="whole rows") as caught:
        codec.params_from_json({"prompt_logprobs": -1})
    assert (caught.value.param, caught.value.value, caught.value.limit) == ("prompt_logprobs", -1, 20)


def test_scores_with_an_impossible_token() -> None:
    score = Score((1, 2, 3), (-0.1, -math.inf), -math.inf, math.inf)
    assert codec.score_from_json(through_json(codec.score_to_json(score))) == score
    nothing = codec.score_from_json(through_json(codec.score_to_json(Score((1,), (), 0.0, math.nan))))
    assert math.isnan(nothing.perplexity)


def test_stats_and_records() -> None:
    stats = EngineStats(
        "m", "d", 1, 2, 3, 4, 5, 16, 7, 8, 9, 10, 11, 12, 13, 14, 15, {"stop": 3}, MemoryLedger(1, 2, 3, 4, "cpu", 5, 6), "float32"
    )  # fmt: skip
    assert codec.stats_from_json(through_json(codec.stats_to_json(stats))) == stats
    request = RequestRecord("r", 1, None, 3, 4, 5, 6, 7, 8, FinishReason.ABORT, (1, 2**62), "why")
    step = codec.StepSummary(1, 2, 3, 0.1, 0.2, 0.3, 0.4, 5, 6, 7, 8, 9, 0, 2**50, 2**51, None)
    records = codec.Records([request], [step])
    assert codec.records_from_json(through_json(codec.records_to_json(records))) == records
