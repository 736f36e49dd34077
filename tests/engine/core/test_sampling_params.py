"""Sampling parameters out of their range are refused by name, with the value and what would have been accepted."""

from __future__ import annotations

from typing import Any

import pytest

from engine.errors import InvalidParamsError
from engine.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("given", "param", "limit"),
    [
        ({"typical_p": 0.0}, "typical_p", "above 0 and at most 1"),
        ({"typical_p": 1.01}, "typical_p", "above 0 and at most 1"),
        ({"typical_p": float("nan")}, "typical_p", "above 0 and at most 1"),
        ({"typical_p": None}, "typical_p", "above 0 and at most 1"),
        ({"best_of": 0}, "best_of", "an integer between 1 and 16"),
        ({"best_of": 17}, "best_of", "an integer between 1 and 16"),
        ({"n": 3, "best_of": 2}, "best_of", "an integer between 3 and 16"),
        ({"best_of": True}, "best_of", "an integer between 1 and 16"),
        ({"prompt_logprobs": 21}, "prompt_logprobs", "an integer between -1 and 20"),
        ({"prompt_logprobs": -2}, "prompt_logprobs", "an integer between -1 and 20"),
        ({"prompt_logprobs": True}, "prompt_logprobs", "an integer between -1 and 20"),
        ({"prompt_logprobs": 0, "logprob_start_len": -1}, "logprob_start_len", "an integer of at least 0"),
        ({"logprobs": 21}, "logprobs", "an integer between 0 and 20"),
        ({"max_tokens": 0}, "max_tokens", "an integer of at least 1"),
        ({"max_tokens": -1, "prompt_logprobs": 0}, "max_tokens", "an integer of at least 0"),
        (
            {"max_tokens": 0, "prompt_logprobs": 0, "min_tokens": 1},
            "min_tokens",
            "an integer between 0 and 0",
        ),
    ],
    ids=str,
)
def test_values_out_of_range_are_refused_by_name(given: dict[str, Any], param: str, limit: str) -> None:
    with pytest.raises(InvalidParamsError) as caught:
        SamplingParams(**given)
    error = caught.value
    assert error.param == param
    assert error.limit == limit
    assert error.value is given[param]
    assert all(part in str(error) for part in (param, limit, repr(given[param])))


def test_each_of_best_of_brings_what_is_chosen_by() -> None:
    each = SamplingParams(n=2, best_of=3, seed=5).each()
    assert [(one.n, one.best_of, one.seed, one.logprobs) for one in each] == [
        (1, None, 5 + i, 0) for i in range(3)
    ]
    assert [one.logprobs for one in SamplingParams(n=2, best_of=2).each()] == [None, None], (
        "nothing to choose"
    )
    assert [one.logprobs for one in SamplingParams(best_of=2, logprobs=4).each()] == [4, 4]
