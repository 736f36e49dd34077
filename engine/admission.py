"""Admission: turns a prompt into a Request, or refuses it with value, limit and remedy, before any work is done.

Boundary: what can never run is refused here; what only has to wait is not (the scheduler queues and preempts).
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from random import Random
from uuid import uuid4

from engine.errors import InvalidRequestError, PromptTooLongError
from engine.grammar import Compiled
from engine.lora import Lora
from engine.pooling import DECODER_POOLINGS
from engine.request import Request
from engine.request import Sequence as RequestSequence
from engine.sampling_params import ALL_LOGPROBS, SamplingParams

MAX_TIMEOUT_S = 86_400
MAX_ROW_VALUES = 2**25  # of the rows of logits that one request may ask for: 128 MiB in float32


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may ask of this engine."""

    max_model_len: int  # prompt and output tokens together
    num_slots: int  # KV positions in the whole pool; the last output token needs none
    vocab_size: int
    can_detokenize: bool
    poolings: tuple[str, ...] = DECODER_POOLINGS

    def check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        """Raises: InvalidRequestError, PromptTooLongError."""
        self._check_prompt(prompt, params)
        if params.stop and not self.can_detokenize:
            raise InvalidRequestError(
                "stop texts need a tokenizer, and this engine has none",
                value=params.stop,
                remedy="Use stop_token_ids.",
                param="stop",
            )
        self._check_scoring(len(prompt), params)
        if params.pooling is not None and params.pooling.kind not in self.poolings:
            raise InvalidRequestError(
                f"this model is not pooled by {params.pooling.kind!r}", value=params.pooling.kind, limit=self.poolings,
                param="pooling", remedy=f"It knows {', '.join(self.poolings)}.",
            )  # fmt: skip
        if params.n != 1 or params.chooses:
            raise InvalidRequestError(
                f"a request is one completion, n is {params.n}, best_of is {params.best_of}",
                value=params.best_of if params.chooses else params.n, limit=1, param="best_of" if params.chooses else "n",
                remedy="Submit each of params.each(), as LLM.generate does.",
            )  # fmt: skip
        self._check_vocabulary("logit_bias", params.logit_bias or ())
        self._check_vocabulary("allowed_token_ids", params.allowed_token_ids or ())
        for word in params.bad_words:
            assert not isinstance(word, str), "bad words were not tokenized"
            self._check_vocabulary("bad_words", word)
        if params.max_tokens is not None:
            total = min(len(prompt) + params.max_tokens, self.max_model_len)
            if total - 1 > self.num_slots:
                raise PromptTooLongError(
                    f"prompt and max_tokens need {total - 1} KV positions, the whole cache has {self.num_slots}",
                    value=total - 1,
                    limit=self.num_slots,
                    param="max_tokens",
                    remedy=f"Lower max_tokens to {self.num_slots + 1 - len(prompt)}, or raise num_blocks.",
                )

    def max_total_tokens(self, num_prompt_tokens: int, params: SamplingParams) -> int:
        """Prompt and output tokens that the request may reach."""
        ceiling = min(self.max_model_len, self.num_slots + 1)
        return ceiling if params.max_tokens is None else min(num_prompt_tokens + params.max_tokens, ceiling)

    def _check_prompt(self, prompt: Sequence[int], params: SamplingParams) -> None:
        if not prompt:
            raise InvalidRequestError(
                "the prompt has no tokens",
                value=0,
                limit=1,
                remedy="Send at least one token.",
                param="prompt",
            )
        most = self.max_model_len - (params.max_tokens != 0)
        if len(prompt) > most:
            output = " with at least one of output" if params.max_tokens != 0 else ""
            raise PromptTooLongError(
                f"the prompt has {len(prompt)} tokens, the context holds {self.max_model_len}{output}",
                value=len(prompt),
                limit=most,
                param="prompt",
                remedy=f"Shorten the prompt to at most {most} tokens.",
            )
        if len(prompt) > self.num_slots:
            raise PromptTooLongError(
                f"the prompt has {len(prompt)} tokens, the whole KV cache holds {self.num_slots}",
                value=len(prompt),
                limit=self.num_slots,
                param="prompt",
                remedy="Shorten the prompt, or raise num_blocks.",
            )
        self._check_vocabulary("prompt", prompt)

    def _check_scoring(self, num_prompt_tokens: int, params: SamplingParams) -> None:
        start = params.logprob_start_len
        if start and start >= num_prompt_tokens:
            raise InvalidRequestError(
                f"logprob_start_len is {start}, the prompt has {num_prompt_tokens} tokens", value=start,
                limit=num_prompt_tokens - 1, param="logprob_start_len", remedy="Score from an earlier token on.",
            )  # fmt: skip
        most = max(1, MAX_ROW_VALUES // self.vocab_size)
        scored = num_prompt_tokens - max(1, start)
        if params.prompt_logprobs == ALL_LOGPROBS and scored > most:
            raise InvalidRequestError(
                f"whole rows of logits of {scored} tokens were asked for; of a vocabulary of {self.vocab_size} at most {most} "
                "are held at once", value=scored, limit=most, param="prompt_logprobs",
                remedy=f"Score at most {most} tokens a request, by logprob_start_len, as LLM.token_kl does.",
            )  # fmt: skip

    def _check_vocabulary(self, param: str, token_ids: Collection[int]) -> None:
        if not token_ids:
            return
        low, high = min(token_ids), max(token_ids)
        if low < 0 or high >= self.vocab_size:
            raise InvalidRequestError(
                f"token id {low if low < 0 else high} is outside the vocabulary",
                value=low if low < 0 else high,
                limit=self.vocab_size - 1,
                param=param,
                remedy=f"Use ids from 0 to {self.vocab_size - 1}.",
            )


def make_request(
    prompt: Sequence[int],
    params: SamplingParams,
    limits: Limits,
    seeds: Random,
    *,
    request_id: str | None = None,
    cache_salt: str = "",
    lora: Lora | None = None,
    arrival_ns: int | None = None,
    compiled: Compiled | None = None,
    priority: int = 0,
    client: str = "",
    timeout_s: float | None = None,
) -> Request:
    """A checked request with its seed drawn. Safe to call from any thread. `timeout_s`: from its arrival on.

    Raises:
        InvalidRequestError, PromptTooLongError: naming value, limit and remedy.
    """
    token_ids = _as_token_ids(prompt)
    limits.check(token_ids, params)
    arrival_ns = time.monotonic_ns() if arrival_ns is None else arrival_ns
    return Request(
        request_id=request_id or uuid4().hex,
        prompt_token_ids=token_ids,
        params=params,
        seed=seeds.getrandbits(63) if params.seed is None else params.seed,
        arrival_ns=arrival_ns,
        deadline_ns=None if timeout_s is None else arrival_ns + _nanoseconds(timeout_s),
        cache_salt=cache_salt,
        priority=priority,
        client=client,
        lora=lora,
        grammar=None if compiled is None else compiled.grammar,
        grammar_compile_ms=0.0 if compiled is None else compiled.compile_ms,
    )


def make_sequence(request: Request, limits: Limits) -> RequestSequence:
    """The scheduler's state of a request that has computed nothing yet."""
    num_prompt_tokens = len(request.prompt_token_ids)
    return RequestSequence(
        request=request,
        token_ids=list(request.prompt_token_ids),
        num_prompt_tokens=num_prompt_tokens,
        max_total_tokens=limits.max_total_tokens(num_prompt_tokens, request.params),
    )


def _nanoseconds(timeout_s: float) -> int:
    if not 0 < timeout_s <= MAX_TIMEOUT_S:  # not a number fails it too
        raise InvalidRequestError(
            f"timeout_s={timeout_s!r} is out of range", value=timeout_s, limit=f"above 0, at most {MAX_TIMEOUT_S}",
            param="timeout_s", remedy="Give seconds, or None for a request that may take what it takes.",
        )  # fmt: skip
    return int(timeout_s * 1e9)


def _as_token_ids(prompt: Sequence[int]) -> tuple[int, ...]:
    """Plain ints, whatever kind of integers came: behind this point nothing checks them again."""
    try:
        if isinstance(prompt, str | bytes | bytearray):
            raise TypeError(f"{type(prompt).__name__} is not a sequence of token ids")
        return tuple(array("q", prompt))
    except (TypeError, OverflowError) as error:
        raise InvalidRequestError(
            f"the prompt is no sequence of token ids: {error}",
            value=type(prompt).__name__,
            limit="a sequence of integers",
            param="prompt",
            remedy="Encode text with the tokenizer first.",
        ) from error
