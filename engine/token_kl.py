"""How far two models' next-token distributions lie apart along one text: exact KL divergence, from whole rows of logits.

A few rows at a time are normalised in float64 and compared; what is kept of a token are its figures.

Boundary: NumPy over rows that requests with ALL_LOGPROBS brought. Which tokens are scored when is ``engine.scoring``'s.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.plan import TokenLogprobs

Rows = NDArray[np.float64]
_ROWS_A_BLOCK = 8  # in float64, several times over


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

    def last(self, num_tokens: int) -> TokenKL:
        """The figures of the text's last tokens alone; `token_ids` keeps the one before them."""
        first = max(0, len(self.kl) - num_tokens)
        return TokenKL(
            self.token_ids[first:], self.kl[first:], self.logprobs[first:], self.other_logprobs[first:], self.same_top[first:]
        )  # fmt: skip


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
    # What has no probability adds nothing, whatever the other says.
    np.subtract(own, other, out=difference, where=p > 0.0)
    kl = np.maximum((p * difference).sum(axis=1), 0.0)  # rounding may lead below zero
    places = np.arange(len(ids))
    same = own.argmax(axis=1) == other.argmax(axis=1)
    return list(
        zip(kl.tolist(), own[places, ids].tolist(), other[places, ids].tolist(), same.tolist(), strict=True)
    )
