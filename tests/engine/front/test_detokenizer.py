"""What streams as text equals what decodes at once, whatever the tokenizer and however the tokens arrive."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from engine.detokenizer import WindowDetokenizer
from engine.tokenizer import Tokenizer

KINDS = ["byte_level", "byte_fallback", "metaspace", "word_piece"]
TEXT = "the 🙂 naïve 👩‍👩‍👧 東京 — the  end\n  a🏳️‍🌈é"


@pytest.fixture(scope="module")
def tokenizers_by_kind(wrapped: Callable[[str], PreTrainedTokenizerFast]) -> dict[str, Tokenizer]:
    return {kind: Tokenizer(wrapped(kind)) for kind in KINDS}


def stream(tokenizer: Tokenizer, ids: list[int], sizes: list[int], skip: bool = True) -> list[str]:
    """The emitted pieces when `ids` arrive in portions of `sizes` (repeated), the flush last."""
    detokenizer = tokenizer.detokenizer(skip)
    pieces, at, turn = [], 0, 0
    while at < len(ids):
        size = sizes[turn % len(sizes)]
        pieces.append(detokenizer.push(tuple(ids[at : at + size])))
        at, turn = at + size, turn + 1
    return [*pieces, detokenizer.flush()]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_streamed_pieces_join_to_the_whole_decoding(
    kind: str, data: st.DataObject, tokenizers_by_kind: dict[str, Tokenizer]
) -> None:
    tokenizer = tokenizers_by_kind[kind]
    # Ids beyond the vocabulary show nothing.
    word = st.integers(0, tokenizer.vocab_size + 2).map(lambda i: [i])
    phrase = st.text(max_size=6).map(lambda text: tokenizer.encode(text, add_special_tokens=False))
    ids = [i for part in data.draw(st.lists(word | phrase, max_size=20)) for i in part]
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    skip = data.draw(st.booleans())
    assert "".join(stream(tokenizer, ids, sizes, skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", KINDS)
def test_no_piece_of_a_valid_text_holds_half_a_character(
    kind: str, tokenizers_by_kind: dict[str, Tokenizer]
) -> None:
    tokenizer = tokenizers_by_kind[kind]
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    pieces = stream(tokenizer, ids, [1])
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert sum(bool(piece) for piece in pieces) > 5  # it streams, rather than holding everything to the end


def test_byte_level_holds_a_character_until_its_last_byte(tokenizers_by_kind: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers_by_kind["byte_level"]
    ids = tokenizer.encode("🏳", add_special_tokens=False)
    assert len(ids) > 1, "the test needs a character of several tokens"
    assert stream(tokenizer, ids, [1]) == [""] * (len(ids) - 1) + ["🏳", ""]


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_bytes_that_form_no_character_are_shown_as_such(
    kind: str, tokenizers_by_kind: dict[str, Tokenizer]
) -> None:
    tokenizer = tokenizers_by_kind[kind]
    start = tokenizer.encode("🏳", add_special_tokens=False)
    first_byte = next(i for i in start if tokenizer.token_bytes(i)[:1] == b"\xf0")
    pieces = stream(tokenizer, [first_byte, *tokenizer.encode("the", add_special_tokens=False)], [1])
    assert pieces[0] == ""
    assert "".join(pieces).startswith("\ufffd")
    assert stream(tokenizer, [first_byte], [1]) == ["", tokenizer.decode([first_byte])] == ["", "\ufffd"]


def test_only_the_first_word_loses_its_leading_space(tokenizers_by_kind: dict[str, Tokenizer]) -> None:
    for kind in ("byte_fallback", "metaspace"):
        tokenizer = tokenizers_by_kind[kind]
        ids = tokenizer.encode("the the", add_special_tokens=False)
        eos = min(tokenizer.eos_token_ids)
        assert "".join(stream(tokenizer, [eos, *ids], [1])) == "the the"


def test_special_tokens_show_only_when_asked_for(tokenizers_by_kind: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers_by_kind["byte_level"]
    ids = tokenizer.encode("a<|user|>b", add_special_tokens=False)
    assert "".join(stream(tokenizer, ids, [1])) == "ab"
    assert "".join(stream(tokenizer, ids, [1], skip=False)) == "a<|user|>b"


def test_token_bytes_join_to_the_text(tokenizers_by_kind: dict[str, Tokenizer]) -> None:
    for kind in ("byte_level", "byte_fallback"):
        tokenizer = tokenizers_by_kind[kind]
        ids = tokenizer.encode(TEXT, add_special_tokens=False)
        assert b"".join(tokenizer.token_bytes(i) for i in ids).decode().strip() == TEXT
        assert tokenizer.token_bytes(10**6) == b""


def test_a_decoder_without_a_table_is_decoded_through_a_window_of_bounded_size(
    tokenizers_by_kind: dict[str, Tokenizer],
) -> None:
    detokenizer = tokenizers_by_kind["word_piece"].detokenizer()
    assert isinstance(detokenizer, WindowDetokenizer)
    for i in range(2000):
        detokenizer.push((i % 200,))
        assert len(detokenizer._context) + len(detokenizer._new) <= 2
