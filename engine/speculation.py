"""Speculation: guessing the tokens to come, so that one step can compute several of a sequence, and whether that pays.

A step computes the guesses behind a sequence's last token and chooses a token at each of their places as it would have
without them: a token follows from the text before it, its seed and its position alone. Guesses that equal what was chosen
are kept, the first that does not ends the row's share of the step. So the tokens are those of an engine without
speculation, greedy or sampled, and so is their distribution.

Where guesses come from changes nothing but how many are right. A draft model draws its own token with the same noise, at the
same seed and position, so that where its distribution is near, its choice mostly is the same.

Boundary: what to guess and when. Which sequence has memory and budget for guesses is the scheduler's decision; clocks are
the engine's. Source: Leviathan et al. 2023 for the scheme; that equal noise makes the choice itself the test is the Gumbel
coupling (Daliri et al. 2025).
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.config import SpeculativeConfig
from engine.draft_progress import Drafting, DraftProgress
from engine.ngram import NgramIndex
from engine.planned_step import PlannedStep
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
MOST_BEHIND = 16  # tokens that a draft model computes of a sequence in the step that guesses; with more it catches up first
CATCH_UP_STEPS = 64  # over which the time of catching up is spread
PAUSE_PER_CATCH_UP = 32  # a pause is at least so many times as long as what was caught up in vain
UNKNOWN = -1  # the place of a guess that a draft model will make


class Speculator:
    """Guesses for the sequences of one scheduler, and the measure of whether they pay."""

    def __init__(self, config: SpeculativeConfig, block_size: int) -> None:
        self._config = config
        self._progress = DraftProgress(block_size) if config.method == "draft_model" else None
        self._left = 0  # known tokens that the draft model may still compute in the step that is planned
        self._indices: dict[Sequence, NgramIndex] = {}
        self._gains: dict[int, GainMeter] = {}  # by the number of rows, rounded up to a power of two
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0

    @property
    def num_tokens(self) -> int:
        """Guesses for one sequence in one step at most."""
        return self._config.num_speculative_tokens

    def begin(self, num_rows: int, max_tokens: int) -> bool:
        """Whether a step in which so many sequences decode should compute guesses; for them, a draft model computes at most
        `max_tokens` known tokens."""
        wants = self._meter(num_rows).wants()
        self._left = max_tokens if wants else 0
        return wants

    def guess(self, seq: Sequence, limit: int) -> list[int]:
        """At most `limit` tokens that may follow those of `seq`; places for them where a draft model makes the guesses."""
        if self._progress is not None:
            lag = self._lag(seq)
            if not can_be_guessed(seq.request.params) or lag > min(MOST_BEHIND, self._left):
                return []
            self._left -= lag
            return [UNKNOWN] * min(limit, self.num_tokens)
        index = self._indices.get(seq)
        if index is None:
            if not can_be_guessed(seq.request.params):
                return []
            index = self._indices[seq] = NgramIndex(
                self._config.prompt_lookup_min, self._config.prompt_lookup_max
            )
        return index.guess(seq.token_ids, min(limit, self.num_tokens))

    def drafting(self, step: PlannedStep) -> Drafting | None:
        """What a draft model computes before `step`: of the sequences that it guesses, and of those that are too far behind."""
        progress = self._progress
        if progress is None:
            return None
        guessed = [chunk for chunk in step.chunks if chunk.drafts]
        rows = [progress.row(chunk.seq, self._lag(chunk.seq), len(chunk.drafts)) for chunk in guessed]
        for seq in step.decoding.sequences if self._left else ():
            if can_be_guessed(seq.request.params) and (lag := self._lag(seq)) > MOST_BEHIND:
                rows.append(progress.row(seq, min(lag, self._left), 0))
                self._left -= rows[-1].num_tokens
                if not self._left:
                    break
        self._left = 0
        return Drafting(rows) if rows else None

    def take_in(self, step: PlannedStep) -> None:
        """`step` was committed: what the draft model computed in it is there."""
        if self._progress is not None and step.drafting is not None:
            there = [row for row in step.drafting.rows if row.seq not in step.dropped]
            self._progress.commit(there, {chunk.seq: chunk.num_right for chunk in step.chunks})

    def forget(self, seq: Sequence) -> None:
        """`seq` has ended."""
        self._indices.pop(seq, None)
        if self._progress is not None:
            self._progress.forget(seq)

    def forget_blocks(self) -> None:
        """No block holds anything any more."""
        if self._progress is not None:
            self._progress.forget_blocks()

    def count(self, seq: Sequence, num_draft: int, num_accepted: int) -> None:
        """So many tokens of `seq` were guessed in a step, and so many of them rightly."""
        self.num_draft_tokens += num_draft
        self.num_accepted_tokens += num_accepted
        seq.num_draft_tokens += num_draft
        seq.num_accepted_tokens += num_accepted

    def observe(self, step: PlannedStep, num_tokens: int, seconds: float) -> None:
        """A committed step took so long, and brought `num_tokens` tokens. Only what decoded and computed nothing else tells."""
        if step.num_decode_tokens != step.num_tokens:
            return
        num_rows, guessed = step.num_tokens - step.num_draft_tokens, bool(step.num_draft_tokens)
        meter = self._meter(num_rows)
        if step.drafting is not None and step.drafting.catches_up:
            seconds = meter.put_off(seconds, guessed=guessed)
            if not guessed:
                return
        meter.observe(num_tokens / num_rows, seconds, guessed=guessed)

    def gains(self) -> dict[int, float]:
        """Tokens a second with guesses over those without, by the number of rows (a power of two), where both were measured."""
        return {rows: gain for rows, meter in self._gains.items() if (gain := meter.gain) is not None}

    def _lag(self, seq: Sequence) -> int:
        assert self._progress is not None
        return self._progress.lag(seq, len(seq.token_ids))

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
    put_off_s: float = 0.0  # time of catching up that no step has carried yet

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

    def put_off(self, seconds: float, *, guessed: bool) -> float:
        """A step in which a draft model caught up took so long: the time of a usual one, the rest to be carried by later ones."""
        usual = self.guessed_s if guessed and self.num_guessed else self.plain_s
        if usual is None or seconds <= usual:
            return seconds
        self.put_off_s += seconds - usual
        return usual

    def observe(self, tokens_per_row: float, seconds: float, *, guessed: bool) -> None:
        """A step took so long, and brought each row so many tokens on average."""
        if not guessed:
            self.plain_s = _mean(self.plain_s, seconds)
            self.num_plain += 1
            self.since_plain = 0
            self.pause = max(0, self.pause - 1)
            return
        carried = self.put_off_s / CATCH_UP_STEPS
        self.put_off_s -= carried
        seconds += carried
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
            in_vain = int(PAUSE_PER_CATCH_UP * self.put_off_s / self.plain_s) if self.plain_s else 0
            self.pause, self.next_pause = (
                max(self.next_pause, in_vain),
                min(LONGEST_PAUSE_STEPS, 2 * self.next_pause),
            )
            self.num_guessed, self.put_off_s = 0, 0.0


def _mean(before: float | None, newest: float) -> float:
    return newest if before is None else before + WEIGHT * (newest - before)
