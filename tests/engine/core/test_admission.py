"""What can never run is refused before any work, with value, limit and remedy; all else is taken."""

from __future__ import annotations

import numpy as np
import pytest

from engine.errors import InvalidRequestError, PromptTooLongError
from engine.request import FinishReason
from engine.sampling_params import SamplingParams


def test_a_prompt_needs_room_for_one_output_token(make_rig) -> None:
    rig = make_rig(max_model_len=32)
    with pytest.raises(PromptTooLongError) as caught:
        rig.engine.make_request([1] * 32, SamplingParams())
    error = caught.value
    assert (error.value, error.limit, error.param) == (32, 31, "prompt")
    assert "at most 31 tokens" in str(error)
    rig.add("a", [1] * 31, max_tokens=None)
    rig.run()
    assert len(rig.tokens("a")) == 1


def test_a_prompt_that_no_empty_cache_could_hold_is_refused(make_rig) -> None:
    rig = make_rig(num_blocks=4, block_size=4)
    with pytest.raises(PromptTooLongError) as caught:
        rig.engine.make_request([1] * 17, SamplingParams(max_tokens=1))
    assert (caught.value.value, caught.value.limit) == (17, 16)
    assert "num_blocks" in str(caught.value)


def test_max_tokens_that_can_never_fit_are_refused_and_the_named_remedy_works(make_rig) -> None:
    rig = make_rig(num_blocks=4, block_size=4)
    with pytest.raises(PromptTooLongError) as caught:
        rig.engine.make_request([1] * 10, SamplingParams(max_tokens=8))
    assert caught.value.param == "max_tokens"
    assert "Lower max_tokens to 7" in str(caught.value)
    rig.add("a", [1] * 10, max_tokens=7)
    rig.run()
    assert (len(rig.tokens("a")), rig.last("a").finish_reason) == (7, FinishReason.LENGTH)


def test_open_max_tokens_end_where_the_cache_ends(make_rig) -> None:
    rig = make_rig(num_blocks=4, block_size=4)
    rig.add("a", [1] * 10, max_tokens=None)
    rig.run()
    assert len(rig.tokens("a")) == 7


@pytest.mark.parametrize(("prompt", "value"), [([1, 261], 261), ([-1, 5], -1)])
def test_token_ids_outside_the_vocabulary_are_refused(make_rig, prompt: list[int], value: int) -> None:
    with pytest.raises(InvalidRequestError, match="outside the vocabulary") as caught:
        make_rig().engine.make_request(prompt, SamplingParams())
    assert (caught.value.value, caught.value.limit) == (value, 260)


def test_an_empty_prompt_is_refused(make_rig) -> None:
    with pytest.raises(InvalidRequestError, match="no tokens"):
        make_rig().engine.make_request([], SamplingParams())


def test_stop_texts_without_a_tokenizer_are_refused(make_rig) -> None:
    with pytest.raises(InvalidRequestError, match="need a tokenizer"):
        make_rig(with_tokenizer=False).engine.make_request([1], SamplingParams(stop=("x",)))


def test_a_prompt_that_is_only_scored_may_fill_the_context(make_rig) -> None:
    rig = make_rig(max_model_len=32)
    rig.add("a", [1] * 32, max_tokens=0, prompt_logprobs=0)
    rig.run()
    assert len(rig.last("a").prompt_logprobs) == 31
    with pytest.raises(PromptTooLongError, match="33 tokens, the context holds 32") as caught:
        rig.add("b", [1] * 33, max_tokens=0, prompt_logprobs=0)
    assert (caught.value.param, caught.value.value, caught.value.limit) == ("prompt", 33, 32)


def test_a_refused_request_leaves_no_trace(make_rig) -> None:
    rig = make_rig()
    with pytest.raises(InvalidRequestError):
        rig.add("a", [], max_tokens=1)
    assert not rig.engine.has_work
    assert rig.engine.stats().num_waiting == 0


@pytest.mark.parametrize("prompt", ["text", b"bytes", [1, 2.5], [1, None], [[1]], [2**70], 5])
def test_what_is_no_sequence_of_token_ids_is_refused(make_rig, prompt: object) -> None:
    with pytest.raises(InvalidRequestError, match="no sequence of token ids"):
        make_rig().engine.make_request(prompt, SamplingParams())


def test_integers_of_any_kind_become_plain_ones(make_rig) -> None:
    request = make_rig().engine.make_request(np.array([1, 2], np.int64), SamplingParams())
    assert request.prompt_token_ids == (1, 2)
    assert {type(token) for token in request.prompt_token_ids} == {int}
