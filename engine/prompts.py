"""Prompts and params as callers give them, one or many, as lists; checked as far as types go, before anything runs."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from engine.errors import InvalidRequestError
from engine.sampling_params import SamplingParams

Prompt = str | Sequence[int]


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts, whether one or many were given; checked as far as types go."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, (bytes, Mapping)) or not hasattr(prompts, "__iter__"):
        raise _no_prompt(prompts)
    items: list[Any] = list(prompts)
    if items and hasattr(items[0], "__index__") and not hasattr(items[0], "__iter__"):
        return [_as_ids(items)]
    return [item if isinstance(item, str) else _as_ids(item) for item in items]


def _as_ids(prompt: Any) -> list[int]:
    """Plain integers, whatever kind of integers came (NumPy's too)."""
    if isinstance(prompt, (bytes, Mapping)):
        raise _no_prompt(prompt)
    try:
        return [operator.index(token) for token in prompt]
    except TypeError as error:
        raise _no_prompt(prompt) from error


def _no_prompt(value: Any) -> InvalidRequestError:
    return InvalidRequestError(
        f"a prompt must be text or a list of token ids, got {type(value).__name__}",
        value=value,
        remedy="Give a str, a list[int], or a list of them.",
        param="prompt",
    )


def params_of(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    """Params of each of `count` prompts, whether one or many were given."""
    given = SamplingParams() if params is None else params
    return one_each(given, SamplingParams, count, param="params", what="sampling params")


def one_each(given: Any, kind: type, count: int, *, param: str, what: str) -> list[Any]:
    """`given` for each of `count` prompts: one of its kind, or None, for all of them; else as many as there are prompts."""
    if given is None or isinstance(given, kind):
        return [given] * count
    each = list(given)
    if len(each) != count:
        raise InvalidRequestError(
            f"{len(each)} {what} were given for {count} prompts",
            value=len(each),
            limit=count,
            remedy="Give one for all, or one for each prompt.",
            param=param,
        )
    return each
