"""Scoring given texts: perplexity in strides, and how far the next-token distributions of two models lie apart.

Requests with prompt_logprobs bring the figures; here is which tokens each of them scores, and what is made of what it brings.
A text is compared in pieces: whole rows of logits are held of one piece at a time, and what a piece has computed is in the
prefix cache when the next one needs it.

Boundary: NumPy over figures and rows. Running the requests is ``engine.llm``'s.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.plan import TokenLogprobs

Rows = NDArray[np.float64]
ROW_VALUES_AT_ONCE = 2**23  # of the rows that one model's requests hold at a time: 32 MiB in float32
_ROWS_A_BLOCK = 8  # in float64, several times over
TOKENS_AT_ONCE = 2**16  # of the windows that run together: bounds what their results hold


@dataclass(frozen=True, slots=True)
class Perplexity:
    """How likely a text is, in nats, each token scored once. Add up several texts' fields for the perplexity of all of them."""

    num_tokens: int  # that were scored: all but the first of a window that overlaps with none before it
    total_logprob: float

    @property
    def perplexity(self) -> float:
        """Per scored token; NaN when there is none."""
        return perplexity_of(self.total_logprob, self.num_tokens)


@dataclass(frozen=True, slots=True)
class TokenKL:
    """How two models differ along one text. Figures are of token_ids[1:], each given all tokens before it, in nats."""

    token_ids: tuple[int, ...]
    kl: tuple[float, ...]  # KL(own ‖ other) over the whole vocabulary
    logprobs: tuple[float, ...]  # of the text's tokens under the own model
    other_logprobs: tuple[float, ...]
    same_top: tuple[bool, ...]  # whether both find the same token most likely

    @property
    def mean_kl(self) -> float:
        """A token; NaN when there is none."""
        return math.fsum(self.kl) / len(self.kl) if self.kl else math.nan


def perplexity_of(total_logprob: float, num_tokens: int) -> float:
    """exp of the mean negative log-probability; NaN without tokens, infinite beyond the floats."""
    if not num_tokens:
        return math.nan
    try:
        return math.exp(-total_logprob / num_tokens)
    except OverflowError:
        return math.inf


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens ``begin … end - 1`` of a text, of which those from `first` on are scored."""

    begin: int
    first: int
    end: int


def windows_of(num_tokens: int, max_length: int, stride: int) -> Iterator[Window]:
    """The windows of a text: each token is scored once, by the first window that holds it and a token before it.

    Source: the guide "Perplexity of fixed-length models" of transformers. It weights a window's mean by one token less than
    it has scored from the second window on; here every token counts the same.
    """
    scored = 0
    for begin in range(0, num_tokens, stride):
        end = min(begin + max_length, num_tokens)
        first = max(scored, begin + 1)
        if first < end:
            yield Window(begin, first, end)
        scored = end
        if end == num_tokens:
            return


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens ``first … end - 1`` of one text, scored with all before them."""

    text: int
    first: int
    end: int


def rounds_of(lengths: Sequence[int], rows_at_once: int, block_size: int) -> Iterator[list[Piece]]:
    """Pieces of texts that may run side by side: at most `rows_at_once` scored tokens, none of one text twice.

    A piece ends one token behind a block's end where it can, so that the next one finds all before it in the prefix cache.
    """
    if rows_at_once > block_size:
        rows_at_once -= rows_at_once % block_size
    together: list[Piece] = []
    for piece in _pieces_of(lengths, rows_at_once):
        num_rows = sum(other.end - other.first for other in together)
        is_full = num_rows + piece.end - piece.first > rows_at_once
        if together and (is_full or together[-1].text == piece.text):
            yield together
            together = []
        together.append(piece)
    if together:
        yield together


def _pieces_of(lengths: Sequence[int], rows_at_once: int) -> Iterator[Piece]:
    for text, length in enumerate(lengths):
        for first in range(1, length, rows_at_once):
            yield Piece(text, first, min(first + rows_at_once, length))


class KLBuilder:
    """Gathers the figures of one text, piece by piece."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._token_ids = tuple(token_ids)
        self._columns: list[tuple[Any, ...]] = []

    def add(self, own: Sequence[TokenLogprobs], other: Sequence[TokenLogprobs]) -> None:
        """What both models' requests brought for the same next tokens, with whole rows."""
        assert len(own) == len(other), (len(own), len(other))
        for begin in range(0, len(own), _ROWS_A_BLOCK):
            part = slice(begin, begin + _ROWS_A_BLOCK)
            ids = np.array([entry.token_id for entry in own[part]])
            self._columns += _compare(_rows(own[part]), _rows(other[part]), ids)

    def build(self) -> TokenKL:
        """Everything that was added."""
        kl, own, other, same = zip(*self._columns, strict=True) if self._columns else ((), (), (), ())
        return TokenKL(self._token_ids, kl, own, other, same)


def _rows(entries: Iterable[TokenLogprobs]) -> Rows:
    """Log-probabilities [n, V] of the whole rows, in float64."""
    rows = []
    for entry in entries:
        assert entry.logits is not None, "whole rows were not asked for"
        rows.append(entry.logits)
    logits = np.stack(rows).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return logits


def _compare(own: Rows, other: Rows, ids: NDArray[np.int64]) -> list[tuple[Any, ...]]:
    """(KL, log-probability of the token under each, same most likely token) of each of n rows."""
    p, difference = np.exp(own), np.zeros_like(own)
    np.subtract(own, other, out=difference, where=p > 0.0)  # what has no probability adds nothing, whatever the other says
    kl = np.maximum((p * difference).sum(axis=1), 0.0)  # rounding may lead below zero
    places = np.arange(len(ids))
    same = own.argmax(axis=1) == other.argmax(axis=1)
    return list(
        zip(kl.tolist(), own[places, ids].tolist(), other[places, ids].tolist(), same.tolist(), strict=True)
    )
