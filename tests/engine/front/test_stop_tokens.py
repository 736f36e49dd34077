"""Stop texts over token borders: however a text is cut into tokens, a stream ends at the same place and shows nothing of the stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from engine import Engine, EngineConfig, FinishReason, SamplingParams, Tokenizer
from engine.fake_runner import FakeRunner
from engine.plan import KVSpec

ALPHABET = "ab é🙂"  # of one, two and four bytes, of which some tokens hold a part


@pytest.fixture(scope="module")
def tokenizer(wrapped: Callable[[str], PreTrainedTokenizerFast]) -> Tokenizer:
    return Tokenizer(wrapped("byte_level"))


@pytest.fixture(scope="module")
def tokens(wrapped: Callable[[str], PreTrainedTokenizerFast], tokenizer: Tokenizer) -> dict[bytes, int]:
    """Tokens by their bytes."""
    ids = range(len(wrapped("byte_level")))
    special = set(wrapped("byte_level").all_special_ids)
    return {tokenizer.token_bytes(i): i for i in ids if i not in special and tokenizer.token_bytes(i)}


def stream(tokenizer: Tokenizer, ids: list[int], params: SamplingParams) -> tuple[list[str], Any]:
    """Texts of the deltas of a model that says `ids`, and the last delta."""
    runner = FakeRunner(64, choose=lambda _request_id, index: ids[index])
    config = EngineConfig(
        model="fake", dtype="float32", device="cpu", num_blocks=64, max_model_len=256, max_batched_tokens=64
    )
    engine = Engine(
        config,
        runner,
        kv_spec=KVSpec(1, 1, 1, 16, 4),
        eos_token_ids=frozenset(),
        vocab_size=400,
        tokenizer=tokenizer,
    )
    engine.add(engine.make_request([5], params.with_(max_tokens=len(ids))))
    deltas = []
    while engine.has_work:
        deltas += engine.step().deltas
    return [delta.text or "" for delta in deltas], deltas[-1]


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(ALPHABET, min_size=1, max_size=24),
    stops=st.lists(st.text(ALPHABET, min_size=1, max_size=4), min_size=1, max_size=3),
    include=st.booleans(),
    data=st.data(),
)
def test_any_tokenization_stops_at_the_same_place(
    tokenizer: Tokenizer,
    tokens: dict[bytes, int],
    text: str,
    stops: list[str],
    include: bool,
    data: st.DataObject,
) -> None:
    rest, ids = text.encode(), []
    while rest:
        lengths = [n for n in range(1, len(rest) + 1) if rest[:n] in tokens]
        length = data.draw(st.sampled_from(lengths))
        ids.append(tokens[rest[:length]])
        rest = rest[length:]
    ends = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text]
    end, begin, first = min(ends, default=(len(text), len(text), None))
    expected = text[: end if include else begin]
    shown, last = stream(
        tokenizer, ids, SamplingParams(stop=tuple(stops), include_stop_str_in_output=include)
    )
    assert "".join(shown) == expected
    assert (last.finish_reason, last.stop_reason) == (
        (FinishReason.LENGTH, None) if first is None else (FinishReason.STOP, first)
    )
    assert all(expected.startswith("".join(shown[:i])) for i in range(len(shown))), "something was taken back"
