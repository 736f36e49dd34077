"""SamplingParams: how the tokens of one request are chosen and when it stops.

Names and meanings follow vLLM's. Values are checked once, at construction, so that everything behind this type
may trust them. The sampling itself is in ``engine.runner.sampler``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sized
from dataclasses import dataclass, field, replace
from typing import Any

from engine.errors import InvalidParamsError
from engine.pooling import Pooling
from engine.structured_outputs import StructuredOutputsParams

MAX_LOGPROBS = 20
ALL_LOGPROBS = -1  # as prompt_logprobs, as in vLLM: of the whole vocabulary
MAX_STOP_STRINGS = 16
MAX_CHOICES = 16
# What a row holds on a device has fixed sizes: tokens with a bias, bad words, their tokens, stop tokens under min_tokens.
MAX_LOGIT_BIASES = 1024
MAX_BAD_WORDS = 256  # a text may be two: at the beginning of a text, and behind a space
MAX_BAD_WORD_TOKENS = 16
MAX_LATE_STOPS = 256
SEED_LIMIT = 2**63


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling and stopping rules of one request.

    What changes logits acts in vLLM's order: allowed_token_ids, bad_words, min_tokens, logit_bias, repetition_penalty,
    frequency_penalty, presence_penalty; then temperature and the filters min_p, top_k, top_p, typical_p. With c(t) the number
    of times that t is in the output, and z its logit:

        repetition_penalty r    z / r where z > 0, else z * r, for each t of prompt or output
        frequency_penalty f     z - f * c(t)
        presence_penalty p      z - p where c(t) > 0

    What `structured_outputs` does not allow is never chosen, and the end only where it may end. What is left of its tokens by
    allowed_token_ids, bad_words and min_tokens may be nothing: then the request ends with an error. A stop text or stop token ends an
    output wherever it comes. Log-probabilities are those of the raw logits.

    typical_p keeps, of what the filters before it left, the tokens whose surprise -log p is nearest to the distribution's entropy:
    the smallest set whose probability reaches typical_p, and all as near as the last of them. It comes last as in transformers;
    vLLM has none.

    Source: vLLM's SamplingParams and sampler (frequency and presence are OpenAI's, repetition is CTRL's, Keskar 2019);
    typical_p: Meister et al. 2022, "Locally Typical Sampling".

    Raises:
        InvalidParamsError: naming the parameter, its value and its range.
    """

    max_tokens: int | None = (
        16  # output tokens at most; None: up to the context's end; 0, with prompt_logprobs or pooling: no output
    )
    temperature: float = 1.0  # 0 is greedy: the most likely token, lowest id first among equals
    top_k: int = 0  # keep the k most likely tokens; 0 or -1: all
    top_p: float = 1.0  # keep the smallest set whose probability reaches top_p
    min_p: float = 0.0  # drop tokens less likely than min_p times the most likely one
    typical_p: float = 1.0  # keep the most typical tokens, up to this probability; 1: all
    presence_penalty: float = 0.0  # -2 … 2
    frequency_penalty: float = 0.0  # -2 … 2
    repetition_penalty: float = 1.0  # above 0; above 1 discourages what was there, below encourages it
    logit_bias: dict[int, float] | None = field(default=None, hash=False)  # by token id, -100 … 100
    bad_words: tuple[str | tuple[int, ...], ...] = ()  # texts or token ids that the output must not hold
    allowed_token_ids: tuple[int, ...] | None = None  # None: all; others are never chosen
    n: int = 1  # completions of the prompt; one after the other with the seed, the seed plus 1, …
    best_of: int | None = (
        None  # generate so many, return the n of the highest mean log-probability a token, the best first
    )
    seed: int | None = None  # None: the engine draws one and records it
    stop: tuple[str, ...] = ()  # texts that end the output; never part of it unless asked for below
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0  # no end-of-sequence or stop before this many output tokens
    structured_outputs: StructuredOutputsParams | None = None  # what the whole output must look like
    logprobs: int | None = None  # None: none; n: the chosen token's and the n most likely tokens'
    prompt_logprobs: int | None = None  # the same of the prompt's tokens; ALL_LOGPROBS: whole rows of logits
    logprob_start_len: int = (
        0  # prompt_logprobs of the tokens from this one on; what is before may come from the cache
    )
    pooling: Pooling | None = None  # with max_tokens=0: the prompt's hidden states become one vector
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", _as_tuple("stop", self.stop, str))
        object.__setattr__(self, "stop_token_ids", _as_tuple("stop_token_ids", self.stop_token_ids, int))
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        if self.max_tokens is not None:
            has_output = self.prompt_logprobs is None and self.pooling is None
            _check_int("max_tokens", self.max_tokens, 1 if has_output else 0, None)
        self._check_pooling()
        _check_float("temperature", self.temperature, 0.0, 100.0)
        _check_int("top_k", self.top_k, 0, None)
        _check_float("top_p", self.top_p, 0.0, 1.0, exclude_low=True)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_float("typical_p", self.typical_p, 0.0, 1.0, exclude_low=True)
        self._check_controls()
        _check_int("n", self.n, 1, MAX_CHOICES)
        if self.best_of is not None:
            _check_int("best_of", self.best_of, self.n, MAX_CHOICES)
        if self.seed is not None:
            _check_int("seed", self.seed, -SEED_LIMIT, SEED_LIMIT - 1)
        _check_int("min_tokens", self.min_tokens, 0, self.max_tokens)
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.prompt_logprobs is not None:
            _check_int("prompt_logprobs", self.prompt_logprobs, ALL_LOGPROBS, MAX_LOGPROBS)
        _check_int("logprob_start_len", self.logprob_start_len, 0, None)
        if len(self.stop) > MAX_STOP_STRINGS or any(not s for s in self.stop):
            raise InvalidParamsError(
                f"stop must be at most {MAX_STOP_STRINGS} texts, none of them empty, got {self.stop!r}",
                value=self.stop,
                limit=MAX_STOP_STRINGS,
                param="stop",
            )

    def _check_pooling(self) -> None:
        if self.pooling is None:
            return
        if not isinstance(self.pooling, Pooling) or self.max_tokens != 0 or self.prompt_logprobs is not None:
            raise InvalidParamsError(
                f"pooling is for a request without output, got {self.pooling!r} with max_tokens={self.max_tokens}",
                value=self.pooling, limit="a Pooling, max_tokens=0, no prompt_logprobs", param="pooling",
                remedy="Use LLM.embed, or /v1/embeddings.",
            )  # fmt: skip

    def _check_controls(self) -> None:
        """What changes logits: in plain form, within range."""
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.0, 100.0, exclude_low=True)
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", _as_biases(self.logit_bias))
        object.__setattr__(self, "bad_words", _as_bad_words(self.bad_words))
        if self.allowed_token_ids is not None:
            allowed = _as_tuple("allowed_token_ids", self.allowed_token_ids, int)
            if not allowed:
                raise InvalidParamsError(
                    "allowed_token_ids is empty: nothing could be chosen", value=allowed, param="allowed_token_ids"
                )  # fmt: skip
            object.__setattr__(self, "allowed_token_ids", allowed)
        if self.min_tokens:
            _check_count("stop_token_ids", self.stop_token_ids, MAX_LATE_STOPS)

    def each(self) -> list[SamplingParams]:
        """The parameters of each completion that is generated: n is 1, and completion i has the seed plus i, where there is a seed.

        Of best_of completions each has its tokens' log-probabilities, by which `engine.best_of` chooses.
        """
        if self.n == 1 and self.best_of is None:
            return [self]
        one, count = replace(self, n=1, best_of=None), self.n
        if self.chooses:
            assert self.best_of is not None
            one, count = replace(one, logprobs=self.logprobs or 0), self.best_of
        if self.seed is None:
            return [one] * count
        seeds = ((self.seed + i + SEED_LIMIT) % (2 * SEED_LIMIT) - SEED_LIMIT for i in range(count))
        return [replace(one, seed=seed) for seed in seeds]

    @property
    def chooses(self) -> bool:
        """Whether more completions are generated than are returned."""
        return self.best_of is not None and self.best_of > self.n

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


def _as_biases(value: Any) -> dict[int, float]:
    """Token ids may come as JSON has them: as decimal texts."""
    if not isinstance(value, Mapping):
        raise InvalidParamsError(
            f"logit_bias must map token ids to biases, got {value!r}", value=value, param="logit_bias"
        )
    biases: dict[int, float] = {}
    for key, bias in value.items():
        token = int(key) if isinstance(key, str) and key.isdecimal() else key
        _check_int("logit_bias", token, 0, None)
        _check_float("logit_bias", bias, -100.0, 100.0)
        biases[token] = float(bias)
    _check_count("logit_bias", biases, MAX_LOGIT_BIASES)
    return biases


def _as_bad_words(value: Any) -> tuple[str | tuple[int, ...], ...]:
    words: list[str | tuple[int, ...]] = []
    for word in (value,) if isinstance(value, str) else value or ():
        words.append(word if isinstance(word, str) else _as_tuple("bad_words", word, int))
        if not words[-1] or (isinstance(word, str) and not word.strip()):
            raise InvalidParamsError(
                f"bad_words must not hold an empty one, got {word!r}", value=word, param="bad_words"
            )
        if not isinstance(word, str):
            _check_count("bad_words", words[-1], MAX_BAD_WORD_TOKENS, "tokens in one of them")
    _check_count("bad_words", words, MAX_BAD_WORDS)
    return tuple(words)


def _check_count(name: str, values: Sized, most: int, what: str = "entries") -> None:
    if len(values) > most:
        raise InvalidParamsError(
            f"{name} must have at most {most} {what}, got {len(values)}", value=len(values), limit=most, param=name
        )  # fmt: skip


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
