"""SamplingParams: how the tokens of one request are chosen and when it stops.

Names and meanings follow vLLM's. Values are checked once, at construction, so that everything behind this type
may trust them. The sampling itself is in ``engine.runner.sampler``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from engine.errors import InvalidParamsError

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
SEED_LIMIT = 2**63


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling and stopping rules of one request.

    Raises:
        InvalidParamsError: naming the parameter, its value and its range.
    """

    max_tokens: int | None = 16  # output tokens at most; None: up to the context's end
    temperature: float = 1.0  # 0 is greedy: the most likely token, lowest id first among equals
    top_k: int = 0  # keep the k most likely tokens; 0 or -1: all
    top_p: float = 1.0  # keep the smallest set whose probability reaches top_p
    min_p: float = 0.0  # drop tokens less likely than min_p times the most likely one
    seed: int | None = None  # None: the engine draws one and records it
    stop: tuple[str, ...] = ()  # texts that end the output; never part of it unless asked for below
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0  # no end-of-sequence or stop before this many output tokens
    logprobs: int | None = None  # None: none; n: the chosen token's and the n most likely tokens'
    prompt_logprobs: bool = False  # log-probability of every prompt token (used by score)
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", _as_tuple("stop", self.stop, str))
        object.__setattr__(self, "stop_token_ids", _as_tuple("stop_token_ids", self.stop_token_ids, int))
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, None)
        _check_float("temperature", self.temperature, 0.0, 100.0)
        _check_int("top_k", self.top_k, 0, None)
        _check_float("top_p", self.top_p, 0.0, 1.0, exclude_low=True)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _check_int("seed", self.seed, -SEED_LIMIT, SEED_LIMIT - 1)
        _check_int("min_tokens", self.min_tokens, 0, self.max_tokens)
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if len(self.stop) > MAX_STOP_STRINGS or any(not s for s in self.stop):
            raise InvalidParamsError(
                f"stop must be at most {MAX_STOP_STRINGS} texts, none of them empty, got {self.stop!r}",
                value=self.stop,
                limit=MAX_STOP_STRINGS,
                param="stop",
            )

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    def with_(self, **changes: Any) -> SamplingParams:
        """A copy with some values changed, checked again."""
        return replace(self, **changes)


def _as_tuple(name: str, value: Any, kind: type) -> tuple[Any, ...]:
    if value is None:
        return ()
    items = (value,) if isinstance(value, kind) else tuple(value)
    if any(not isinstance(item, kind) or isinstance(item, bool) for item in items):
        raise InvalidParamsError(
            f"{name} must hold only {kind.__name__} values, got {value!r}", value=value, param=name
        )
    return items


def _check_int(name: str, value: Any, low: int, high: int | None) -> None:
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= low
    if ok and (high is None or value <= high):
        return
    limit = f"an integer of at least {low}" if high is None else f"an integer between {low} and {high}"
    raise InvalidParamsError(f"{name} must be {limit}, got {value!r}", value=value, limit=limit, param=name)


def _check_float(name: str, value: Any, low: float, high: float, *, exclude_low: bool = False) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if number and low <= value <= high and not (exclude_low and value == low):
        return
    limit = f"{'above' if exclude_low else 'at least'} {low:g} and at most {high:g}"
    raise InvalidParamsError(f"{name} must be {limit}, got {value!r}", value=value, limit=limit, param=name)
