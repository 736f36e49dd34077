"""Scoring given texts: perplexity in strides, and how far the next-token distributions of two models lie apart.

Requests with prompt_logprobs bring the figures; here is which tokens each of them scores, and how they are run. A text is
compared in pieces: whole rows of logits are held of one piece at a time, and what a piece has computed is in the prefix cache
when the next one needs it.

Boundary: requests through an LLM's worker. Comparing rows is ``engine.token_kl``'s; `LLM.perplexity` and `LLM.token_kl` are the
way in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.errors import InvalidRequestError, StepFailedError
from engine.plan import TokenLogprobs
from engine.records import Completion
from engine.request import FinishReason
from engine.sampling_params import ALL_LOGPROBS, SamplingParams
from engine.token_kl import KLBuilder, TokenKL
from engine.waiting import abort_all, finished

if TYPE_CHECKING:
    from engine.llm import LLM
    from engine.prompts import Prompt

ROW_VALUES_AT_ONCE = 2**23  # of the rows that one model's requests hold at a time: 32 MiB in float32
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


def perplexity(
    llm: LLM,
    texts: Sequence[Prompt],
    *,
    stride: int | None,
    max_length: int | None,
    lora: str | None,
    use_tqdm: bool,
) -> list[Perplexity]:
    """As `LLM.perplexity`."""
    most = llm.config.max_model_len
    assert most is not None
    length = _int_between("max_length", most if max_length is None else max_length, 2, most)
    step = _int_between("stride", length // 2 if stride is None else stride, 1, length)
    many = [_ids_of(llm, text) for text in texts]
    windows = [(i, window) for i, ids in enumerate(many) for window in windows_of(len(ids), length, step)]
    counts, totals = [0] * len(many), [0.0] * len(many)
    at_once = max(1, TOKENS_AT_ONCE // length)
    for begin in range(0, len(windows), at_once):
        part = windows[begin : begin + at_once]
        streams = llm.worker.submit_all(
            [many[i][window.begin : window.end] for i, window in part],
            [scoring_params(window.first - window.begin) for _, window in part],
            loras=[lora] * len(part),
        )
        for (i, window), completion in zip(part, finished(streams, use_tqdm), strict=True):
            counts[i] += window.end - window.first
            totals[i] += math.fsum(entry.logprob for entry in entries_of(completion))
    return [Perplexity(count, total) for count, total in zip(counts, totals, strict=True)]


def token_kl(
    llm: LLM, other: LLM, texts: Sequence[Prompt], *, lora: str | None, other_lora: str | None
) -> list[TokenKL]:
    """As `LLM.token_kl`."""
    many = [_ids_of(llm, text) for text in texts]
    _check_comparable(llm, other, texts, many)
    builders = [KLBuilder(ids) for ids in many]
    rows_at_once = max(1, ROW_VALUES_AT_ONCE // llm.worker.vocab_size)
    for pieces in rounds_of([len(ids) for ids in many], rows_at_once, llm.config.block_size):
        prompts = [many[piece.text][: piece.end] for piece in pieces]
        params = [scoring_params(piece.first, ALL_LOGPROBS) for piece in pieces]
        streams = llm.worker.submit_all(prompts, params, loras=[lora] * len(pieces))
        try:
            streams += other.worker.submit_all(prompts, params, loras=[other_lora] * len(pieces))
        except BaseException:
            abort_all(streams)
            raise
        entries = [entries_of(completion) for completion in finished(streams)]
        for piece, own, others in zip(pieces, entries[: len(pieces)], entries[len(pieces) :], strict=True):
            builders[piece.text].add(own, others)
    return [builder.build() for builder in builders]


def scoring_params(start: int = 0, num_logprobs: int = 0) -> SamplingParams:
    """Params of a request that generates nothing and scores its prompt from token `start` on."""
    return SamplingParams(max_tokens=0, prompt_logprobs=num_logprobs, logprob_start_len=start)


def entries_of(completion: Completion) -> tuple[TokenLogprobs, ...]:
    """What such a request brought.

    Raises:
        StepFailedError: it did not come to its end.
    """
    if completion.finish_reason is not FinishReason.LENGTH:
        raise StepFailedError(completion.error or "scoring failed", value=completion.request_id)
    return completion.prompt_logprobs


def _ids_of(llm: LLM, text: Prompt) -> list[int]:
    return llm.tokenizer.encode(text) if isinstance(text, str) else list(text)


def _check_comparable(llm: LLM, other: LLM, texts: Sequence[Prompt], ids: Sequence[list[int]]) -> None:
    own_size, other_size = llm.worker.vocab_size, other.worker.vocab_size
    if own_size != other_size:
        raise InvalidRequestError(
            f"the models' vocabularies differ: {own_size} and {other_size} tokens", value=other_size, limit=own_size,
            param="other", remedy="Compare models with the same tokenizer.",
        )  # fmt: skip
    most = min(each.config.max_model_len or 0 for each in (llm, other))
    for i, (text, tokens) in enumerate(zip(texts, ids, strict=True)):
        if len(tokens) > most:
            raise InvalidRequestError(
                f"text {i} has {len(tokens)} tokens, the shorter context holds {most}", value=len(tokens), limit=most,
                param="texts", remedy="Cut it into shorter ones.",
            )  # fmt: skip
        if isinstance(text, str) and other.tokenizer.encode(text) != tokens:
            raise InvalidRequestError(
                f"the models read text {i} as different tokens", value=i, limit="the same tokens", param="texts",
                remedy="Compare models with the same tokenizer, or give token ids.",
            )  # fmt: skip


def _int_between(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
        return value
    raise InvalidRequestError(
        f"{name} must be an integer from {low} to {high}, got {value!r}", value=value, limit=high, param=name
    )
