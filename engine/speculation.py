"""Speculation: guessing the tokens to come, so that one step can compute several of a sequence, and whether that pays.

A step computes the guesses behind a sequence's last token and chooses a token at each of their places as it would have
without them: a token follows from the text before it, its seed and its position alone. Guesses that equal what was chosen
are kept, the first that does not ends the row's share of the step. So the tokens are those of an engine without
speculation, greedy or sampled, and so is their distribution.

Boundary: what to guess and when. Which sequence has memory and budget for guesses is the scheduler's decision; clocks are
the engine's. Source: Leviathan et al. 2023 for the scheme; that equal noise makes the choice itself the test is the Gumbel
coupling (Daliri et al. 2025).
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.config import SpeculativeConfig
from engine.ngram import NgramIndex
from engine.request import Sequence
from engine.sampling_params import SamplingParams

FIRST_PLAIN_STEPS = 4  # measured before anything is guessed
FIRST_GUESSED_STEPS = 8  # measured before it is judged
REFRESH_STEPS = 64  # while guessing: every so many steps one without, whose time may have changed
FIRST_PAUSE_STEPS = (
    64  # without guesses after they did not pay; twice as many after each trial that fails again
)
LONGEST_PAUSE_STEPS = 4096
WEIGHT = 0.1  # of the newest figure in a running mean


class Speculator:
    """Guesses for the sequences of one scheduler, and the measure of whether they pay."""

    def __init__(self, config: SpeculativeConfig) -> None:
        self._config = config
        self._indices: dict[Sequence, NgramIndex] = {}
        self._gains: dict[int, GainMeter] = {}  # by the number of rows, rounded up to a power of two
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0

    @property
    def num_tokens(self) -> int:
        """Guesses for one sequence in one step at most."""
        return self._config.num_speculative_tokens

    def wants(self, num_rows: int) -> bool:
        """Whether a step in which so many sequences decode should compute guesses."""
        return self._meter(num_rows).wants()

    def guess(self, seq: Sequence, limit: int) -> list[int]:
        """At most `limit` tokens that may follow those of `seq`."""
        index = self._indices.get(seq)
        if index is None:
            if not can_be_guessed(seq.request.params):
                return []
            index = self._indices[seq] = NgramIndex(
                self._config.prompt_lookup_min, self._config.prompt_lookup_max
            )
        return index.guess(seq.token_ids, min(limit, self.num_tokens))

    def forget(self, seq: Sequence) -> None:
        """`seq` has ended."""
        self._indices.pop(seq, None)

    def count(self, seq: Sequence, num_draft: int, num_accepted: int) -> None:
        """So many tokens of `seq` were guessed in a step, and so many of them rightly."""
        self.num_draft_tokens += num_draft
        self.num_accepted_tokens += num_accepted
        seq.num_draft_tokens += num_draft
        seq.num_accepted_tokens += num_accepted

    def observe(self, num_rows: int, num_tokens: int, seconds: float, *, guessed: bool) -> None:
        """A step in which `num_rows` sequences decoded, and nothing else was computed, brought them `num_tokens` tokens."""
        self._meter(num_rows).observe(num_tokens / num_rows, seconds, guessed=guessed)

    def gains(self) -> dict[int, float]:
        """Tokens a second with guesses over those without, by the number of rows (a power of two), where both were measured."""
        return {rows: gain for rows, meter in self._gains.items() if (gain := meter.gain) is not None}

    def _meter(self, num_rows: int) -> GainMeter:
        size = 1 << (num_rows - 1).bit_length() if num_rows else 0
        meter = self._gains.get(size)
        if meter is None:
            meter = self._gains[size] = GainMeter(self._config.min_gain)
        return meter


def can_be_guessed(params: SamplingParams) -> bool:
    """Whether a token's choice follows from the text before it and its position alone.

    Penalties keep count of the tokens chosen, and a grammar its state: both know the guesses only when they are chosen.
    """
    has_penalties = params.repetition_penalty != 1.0 or params.frequency_penalty or params.presence_penalty
    return not has_penalties and params.structured_outputs is None


@dataclass(slots=True)
class GainMeter:
    """Whether guessing pays, from the times of steps with and without guesses, taken in turns."""

    min_gain: float
    plain_s: float | None = None  # a step without guesses: one token a row
    guessed_s: float | None = None
    tokens_per_row: float = 1.0  # of a step with guesses
    num_plain: int = 0
    num_guessed: int = 0  # since the last pause
    since_plain: int = 0
    pause: int = 0  # steps without guesses still to come
    next_pause: int = FIRST_PAUSE_STEPS

    @property
    def gain(self) -> float | None:
        if self.plain_s is None or self.guessed_s is None:
            return None
        return self.tokens_per_row * self.plain_s / self.guessed_s

    def wants(self) -> bool:
        """Whether the next step should compute guesses."""
        if not self.min_gain:
            return True
        return self.num_plain >= FIRST_PLAIN_STEPS and not self.pause and self.since_plain < REFRESH_STEPS

    def observe(self, tokens_per_row: float, seconds: float, *, guessed: bool) -> None:
        """A step took so long, and brought each row so many tokens on average."""
        if not guessed:
            self.plain_s = _mean(self.plain_s, seconds)
            self.num_plain += 1
            self.since_plain = 0
            self.pause = max(0, self.pause - 1)
            return
        # A first figure would weigh as much as all others together: a trial begins anew.
        if not self.num_guessed:
            self.guessed_s, self.tokens_per_row = seconds, tokens_per_row
        self.guessed_s = _mean(self.guessed_s, seconds)
        self.tokens_per_row = _mean(self.tokens_per_row, tokens_per_row)
        self.num_guessed += 1
        self.since_plain += 1
        gain = self.gain
        if gain is None or self.num_guessed < FIRST_GUESSED_STEPS:
            return
        if gain >= self.min_gain:
            self.next_pause = FIRST_PAUSE_STEPS
        else:
            self.pause, self.next_pause = self.next_pause, min(LONGEST_PAUSE_STEPS, 2 * self.next_pause)
            self.num_guessed = 0


def _mean(before: float | None, newest: float) -> float:
    return newest if before is None else before + WEIGHT * (newest - before)
