"""Controls: what one row asks for that changes its logits, beside temperature and filters.

Definitions are SamplingParams'. Boundary: NumPy on the host, for both row batches; who applies them to logits is the sampler.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engine.kernels.penalties import FULL, IN_PROMPT, ONE_OUTPUT
from engine.plan import Int32, RowAdmission

NEVER_ENDS = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Ban:
    """A token that must not come: behind the output tokens `prefix`, at positions before `until`."""

    token_id: int
    prefix: tuple[int, ...] = ()
    until: int = NEVER_ENDS


@dataclass(frozen=True, slots=True)
class Controls:
    """What changes one row's logits."""

    num_prompt_tokens: int
    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0
    biases: dict[int, float] = field(default_factory=dict)
    allowed: tuple[int, ...] | None = None
    bans: tuple[Ban, ...] = ()
    has_grammar: bool = False  # a mask comes with every token (``engine.runner.structured``)

    @property
    def counts_tokens(self) -> bool:
        return (self.repetition, self.frequency, self.presence) != (1.0, 0.0, 0.0)

    @property
    def is_limited(self) -> bool:
        """Whether only some tokens may come."""
        return self.allowed is not None or self.has_grammar

    @property
    def end(self) -> int:
        """The position from which on they change nothing, but for a grammar's masks."""
        if self.counts_tokens or self.biases or self.allowed is not None:
            return NEVER_ENDS
        return max((ban.until for ban in self.bans), default=0)

    def marks(self, token_ids: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int16]]:
        """Ids and marks (``engine.kernels.penalties``) of the tokens of a row's text."""
        text = np.asarray(token_ids, dtype=np.int64)
        output, count = np.unique(text[self.num_prompt_tokens :], return_counts=True)
        prompt = np.unique(text[: self.num_prompt_tokens])
        ids = np.union1d(prompt, output)
        values = np.where(np.isin(ids, prompt), IN_PROMPT, 0)
        values[np.searchsorted(ids, output)] += ONE_OUTPUT * np.minimum(count, FULL // ONE_OUTPUT)
        return ids, values.astype(np.int16)

    def banned(self, output: Int32 | list[int]) -> list[int]:
        """Tokens that must not come behind these output tokens."""
        position = self.num_prompt_tokens + len(output)
        return [ban.token_id for ban in self.bans if position < ban.until and _ends_with(output, ban.prefix)]


def controls_of(admission: RowAdmission, eos_token_ids: frozenset[int], vocab_size: int) -> Controls | None:
    """The controls of a sequence that takes a row; None where it asks for none."""
    params, num_prompt = admission.params, admission.num_prompt_tokens
    bans = [
        Ban(word[-1], tuple(map(int, word[:-1]))) for word in params.bad_words if not isinstance(word, str)
    ]
    if params.min_tokens:
        stops = set(params.stop_token_ids) | (set() if params.ignore_eos else eos_token_ids)
        until = num_prompt + params.min_tokens
        bans += [Ban(token, until=until) for token in sorted(stops) if 0 <= token < vocab_size]
    found = Controls(
        num_prompt,
        params.repetition_penalty,
        params.frequency_penalty,
        params.presence_penalty,
        params.logit_bias or {},
        params.allowed_token_ids,
        tuple(bans),
        admission.grammar is not None,
    )
    return found if found.end or found.has_grammar else None


def _ends_with(output: Int32 | list[int], prefix: tuple[int, ...]) -> bool:
    return not prefix or tuple(map(int, output[-len(prefix) :])) == prefix
