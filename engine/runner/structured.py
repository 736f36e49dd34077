"""GrammarRows: which tokens may come next in the rows that follow a grammar.

A row's matcher stands behind the newest token that the host knows, or just before it: it takes that one in when the next mask is
filled, so that both find the grammar in the processor's cache. A step whose rows follow grammars (`Followed`) needs the tokens of the
step before it: its forward pass runs meanwhile, then its masks are filled in one call, and its sampler waits for them. Tokens that a
row's other controls forbid are taken out here too, so that a row that is left without any is found before something is chosen for it.

Boundary: NumPy and xgrammar, on the host; who applies a mask to logits is the sampler. Speculation may later take tokens back:
matchers can (``GrammarMatcher.rollback``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.plan import Int32, RowAdmission, StepPlan
from engine.runner.controls import Controls

EVERYTHING = -1  # a word of a mask with all bits set


class _Follower:
    """One row's place in its grammar."""

    __slots__ = (
        "allowed",
        "chosen",
        "controls",
        "is_limited",
        "is_over",
        "matcher",
        "output",
        "stop_token_ids",
    )

    def __init__(self, admission: RowAdmission, controls: Controls | None, words: int) -> None:
        import xgrammar

        assert admission.grammar is not None
        # Only tokens without text of their own can end an output here: others are the grammar's to allow.
        self.stop_token_ids = admission.grammar.stop_token_ids
        self.matcher: Any = xgrammar.GrammarMatcher(admission.grammar.compiled)
        self.controls = controls
        self.output: list[int] = list(admission.token_ids[admission.num_prompt_tokens :])
        self.chosen: int | None = None  # the newest token, which the matcher has not seen
        self.is_limited = controls is not None and bool(controls.bans or controls.allowed)
        self.is_over = False  # nothing follows, or nothing could
        self.allowed: Int32 | None = None
        if controls is not None and controls.allowed is not None:
            self.allowed = token_bits(controls.allowed, words)
        for token in self.output:
            assert self.matcher.accept_token(token), f"{admission.request_id}: {token} is not of its grammar"

    def catch_up(self) -> None:
        """Have the matcher take the newest token in."""
        token, self.chosen = self.chosen, None
        # One by one: a batched call's answers are read by a call each.
        if token is not None and not self.matcher.accept_token(token):
            raise AssertionError(f"token {token} was chosen against its grammar")


@dataclass(slots=True)
class Followed:
    """The rows of one step that follow a grammar, in the order of those that sample."""

    places: list[int]  # which of the step's L choices
    rows: list[int]
    followers: list[_Follower]
    is_known: bool = False  # the chosen tokens were taken in
    dead_ends: dict[int, str] = field(default_factory=dict)  # by place: why no token is possible


class GrammarRows:
    """The rows of one runner that follow a grammar."""

    def __init__(self, vocab_size: int) -> None:
        self._words = -(-vocab_size // 32)
        self._followers: dict[int, _Follower] = {}
        self._filler: Any = None  # xgrammar.BatchGrammarMatcher
        self._found = np.empty((0, self._words), np.int32)  # the masks of one step

    def admit(self, admission: RowAdmission, controls: Controls | None) -> None:
        """A row is taken; after a preemption the outputs so far are followed again."""
        if admission.grammar is not None:
            self._followers[admission.row] = _Follower(admission, controls, self._words)

    def leave(self, row: int) -> None:
        """A row is given back."""
        self._followers.pop(row, None)

    def followed(self, plan: StepPlan) -> Followed | None:
        """The rows that follow a grammar and sample in this step; None where there are none."""
        if not self._followers:
            return None
        sampling = plan.rows[plan.choices.row_index].tolist()
        places = [j for j, row in enumerate(sampling) if row in self._followers]
        if not places:
            return None
        rows = [sampling[j] for j in places]
        return Followed(places, rows, [self._followers[row] for row in rows])

    def masks(self, step: Followed) -> Int32:
        """Which tokens each of the rows may take: int32 [rows, ceil(V / 32)], bit ``j % 32`` of word ``j // 32`` is token j's.

        A row that may take none is a dead end of the step, and its mask is full, as is that of a row whose output is over. Valid until
        the next call.
        """
        if len(self._found) < len(step.rows):
            self._found = np.empty((len(step.rows), self._words), np.int32)
        found = self._found[: len(step.rows)]
        going: list[int] = []
        matchers: list[Any] = []
        for i, follower in enumerate(step.followers):
            if follower.is_over:
                found[i] = EVERYTHING
                continue
            follower.catch_up()
            going.append(i)
            matchers.append(follower.matcher)
        if going:
            self._fill(matchers, found, going)
        for i in going:
            if step.followers[i].is_limited:
                _take_out(step.followers[i], found[i])
        for i in np.flatnonzero(np.bitwise_or.reduce(found, axis=1) == 0).tolist():
            step.followers[i].is_over = True
            step.dead_ends[step.places[i]] = _dead_end(step.followers[i])
            found[i] = EVERYTHING
        return found

    def advance(self, step: Followed, token_ids: Sequence[int]) -> None:
        """Take in the tokens [L] that the step chose. A second call does nothing."""
        if step.is_known:
            return
        step.is_known = True
        for place, follower in zip(step.places, step.followers, strict=True):
            if follower.is_over:
                continue
            follower.catch_up()
            token = follower.chosen = token_ids[place]
            follower.output.append(token)
            follower.is_over = token in follower.stop_token_ids

    def reset(self) -> None:
        """Forget every row."""
        self._followers.clear()

    def _fill(self, matchers: list[Any], found: Int32, places: list[int]) -> None:
        if self._filler is None:
            import xgrammar

            self._filler = xgrammar.BatchGrammarMatcher(max_threads=1)
        self._filler.batch_fill_next_token_bitmask(matchers, found, places)


def token_bits(token_ids: Sequence[int], words: int) -> Int32:
    """One bit a token of the vocabulary, in words of 32."""
    is_in = np.zeros(words * 32, dtype=np.uint8)
    is_in[list(token_ids)] = 1
    return np.packbits(is_in, bitorder="little").view(np.int32)


def _take_out(follower: _Follower, mask: Int32) -> None:
    """Take what the row's other controls forbid at its next token out of its mask."""
    controls = follower.controls
    assert controls is not None
    if follower.allowed is not None:
        mask &= follower.allowed
    for token in controls.banned(follower.output):
        mask[token // 32] &= np.uint32(~(1 << token % 32) & 0xFFFFFFFF).astype(np.int32)


def _dead_end(follower: _Follower) -> str:
    others = "" if not follower.is_limited else "; allowed_token_ids, bad_words and min_tokens count"
    return f"structured_outputs: no token can follow the {len(follower.output)} that were generated{others}"
