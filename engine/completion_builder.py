"""CompletionBuilder: gathers the deltas of one request, adds their text, and makes the Completion of them.

Runs in the reader's thread. Boundary: figures and text of one request; who reads when is ``engine.stream``'s.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.detokenizer import IncrementalDetokenizer
from engine.plan import TokenLogprobs
from engine.records import Completion, StreamDelta
from engine.request import FinishReason, Request

NS_PER_MS = 1_000_000


class CompletionBuilder:
    """One request's output so far. Not thread-safe: one reader."""

    __slots__ = (
        "_cached", "_detokenizer", "_first_ns", "_last_ns", "_logprobs", "_prompt_logprobs", "_request", "_texts",
        "_token_ids",
    )  # fmt: skip

    def __init__(self, request: Request, detokenizer: IncrementalDetokenizer | None) -> None:
        self._request = request
        self._detokenizer = detokenizer
        self._token_ids: list[int] = []
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprobs] = []
        self._prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        self._first_ns: int | None = None
        self._last_ns = 0
        self._cached = 0

    @property
    def num_tokens(self) -> int:
        return len(self._token_ids)

    def add(self, delta: StreamDelta) -> StreamDelta:
        """Take the delta in; it is returned with its text."""
        self._add_figures(delta)
        if delta.text is None:
            delta = delta._replace(text=self._decode(delta.token_ids, delta.finish_reason))
        if delta.text:
            self._texts.append(delta.text)
        return delta

    def add_all(self, deltas: list[StreamDelta]) -> None:
        """Take many in at once; they are not given to anyone, so their text is decoded together."""
        ids: list[int] = []
        for delta in deltas:
            self._add_figures(delta)
            if delta.text is not None:
                self._texts.append(delta.text)
            else:
                ids += delta.token_ids
        end = deltas[-1].finish_reason if deltas[-1].text is None else None
        if ids or end is not None:
            self._texts.append(self._decode(ids, end))

    def _add_figures(self, delta: StreamDelta) -> None:
        if delta.token_ids:
            self._token_ids += delta.token_ids
            self._last_ns = delta.created_ns
            if self._first_ns is None:
                self._first_ns = delta.created_ns
        if delta.logprobs:
            self._logprobs += delta.logprobs
        if delta.prompt_logprobs:
            self._prompt_logprobs += delta.prompt_logprobs
        if delta.num_cached_tokens:
            self._cached = delta.num_cached_tokens

    def _decode(self, token_ids: Sequence[int], finish_reason: FinishReason | None) -> str:
        detokenizer = self._detokenizer
        if detokenizer is None:
            return ""
        if finish_reason is None:
            return detokenizer.push(token_ids)
        if finish_reason is FinishReason.STOP and not self._request.params.include_stop_str_in_output:
            token_ids = token_ids[:-1]  # the token that ended it is part of the output, its text is not
        return detokenizer.push(token_ids) + detokenizer.flush()

    def finish(self, last: StreamDelta) -> Completion:
        assert last.finish_reason is not None
        arrival = self._request.arrival_ns
        ttft = tpot = None
        if self._first_ns is not None:
            ttft = (self._first_ns - arrival) / NS_PER_MS
            if len(self._token_ids) > 1:
                tpot = (self._last_ns - self._first_ns) / NS_PER_MS / (len(self._token_ids) - 1)
        return Completion(
            request_id=self._request.request_id,
            prompt_token_ids=self._request.prompt_token_ids,
            token_ids=tuple(self._token_ids),
            text="".join(self._texts),
            finish_reason=last.finish_reason,
            stop_reason=last.stop_reason,
            logprobs=tuple(self._logprobs),
            prompt_logprobs=self._prompt_logprobs,
            num_cached_tokens=self._cached,
            seed=self._request.seed,
            ttft_ms=ttft,
            tpot_ms=tpot,
            e2e_ms=(last.created_ns - arrival) / NS_PER_MS,
            error=last.error,
            pooled=last.pooled,
        )
