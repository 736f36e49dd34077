"""Outbox: what live requests are owed — their deltas and, when they end, their records.

It follows each request's text where stop texts were asked for, and only there. Boundary: it reads commits and ends no
sequence itself: a stop text that it finds is reported back, and the engine ends the sequence.
"""

from __future__ import annotations

from itertools import groupby
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from engine.decode_rows import NO_ROWS, DecodeRows, without
from engine.plan import TokenLogprobs
from engine.planned_step import Commit, PooledPart
from engine.recording import Recorder
from engine.records import RequestRecord, StreamDelta, TokenBatch
from engine.request import FinishReason, Request, Sequence
from engine.stop_text import StopTextMatcher
from engine.tokenizer import IncrementalDetokenizer


class RequestTrack:
    """What is remembered of a live request besides its Sequence."""

    __slots__ = (
        "admitted_ns", "detokenizer", "matcher", "num_cached_tokens", "pooled", "prompt_logprobs", "request",
        "token_ns",
    )  # fmt: skip

    def __init__(self, request: Request, detokenizer: IncrementalDetokenizer | None) -> None:
        params = request.params
        self.request = request
        self.admitted_ns: int | None = None
        self.num_cached_tokens = 0
        self.token_ns: list[int] = []  # when each output token was committed
        self.prompt_logprobs: dict[int, TokenLogprobs] = {}  # by position
        self.pooled: NDArray[np.float64] | None = None  # the sum of what chunks brought
        self.detokenizer = detokenizer
        self.matcher: StopTextMatcher | None = None
        if params.stop:
            assert detokenizer is not None, "stop texts need a detokenizer"
            self.matcher = StopTextMatcher(params.stop, include_in_output=params.include_stop_str_in_output)

    def watch(self, token: int, reason: FinishReason | None) -> str:
        """Text that this token makes certain. A stop token's own text is not output."""
        params, matcher, detokenizer = self.request.params, self.matcher, self.detokenizer
        assert matcher is not None
        assert detokenizer is not None
        text = ""
        if reason is not FinishReason.STOP or params.include_stop_str_in_output:
            text = detokenizer.push((token,))
        if reason is not None:
            text += detokenizer.flush()
        if len(self.token_ns) < params.min_tokens:
            text = matcher.pass_over(text)
        else:
            text = matcher.push(text)
        if reason is not None and matcher.matched is None:
            text += matcher.flush()
        return text

    def watch_all(self, tokens: list[int], reason: FinishReason | None, now_ns: int) -> tuple[str, int]:
        """Text that these tokens make certain, and how many of them were read: a stop text ends the output amid them.

        `reason`: why the last of them ends the request.
        """
        assert self.matcher is not None
        text = ""
        for i, token in enumerate(tokens, 1):
            self.token_ns.append(now_ns)
            text += self.watch(token, reason if i == len(tokens) else None)
            if self.matcher.matched is not None:
                return text, i
        return text, len(tokens)

    def rest(self) -> str | None:
        """Text still held back when the request ends without another token; None if its text is not followed."""
        if self.matcher is None or self.detokenizer is None:
            return None
        return self.matcher.flush() + self.detokenizer.flush()

    def add_pooled(self, part: PooledPart) -> None:
        """Add what a chunk brought; one from the beginning counts anew, after a preemption."""
        self.pooled = part.values if self.pooled is None or not part.start else self.pooled + part.values

    def pooled_vector(self, reason: FinishReason) -> NDArray[np.float64] | None:
        """The request's vector, once all of its prompt is in it."""
        pooling = self.request.params.pooling
        if pooling is None or self.pooled is None or reason is not FinishReason.LENGTH:
            return None
        return self.pooled if pooling.kind != "mean" else self.pooled / len(self.request.prompt_token_ids)

    def prompt_logprobs_in_order(self) -> tuple[TokenLogprobs, ...]:
        """They are told once, and forgotten."""
        entries, self.prompt_logprobs = self.prompt_logprobs, {}
        return tuple(entries[position] for position in sorted(entries))


class Outbox:
    """Collects deltas and request records until the engine's step hands them out."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._tracks: dict[str, RequestTrack] = {}
        self._tokens: TokenBatch | None = None
        self._deltas: list[StreamDelta] = []
        self._requests: list[RequestRecord] = []
        self._num_watched = 0  # live requests with stop texts
        self._num_scored = 0  # live requests that asked for log-probabilities of their prompt
        self._forget_plain()

    def _forget_plain(self) -> None:
        """Of the last commit: what its rows without anything special were derived from, these rows, and their times."""
        self._plain_of: tuple[DecodeRows, list[int]] = NO_ROWS, []
        self._plain_rows = NO_ROWS
        self._plain_token_ns: list[list[int]] = []

    def open(self, request: Request, detokenizer: IncrementalDetokenizer | None) -> None:
        """Begin to follow a request."""
        self._tracks[request.request_id] = RequestTrack(request, detokenizer)
        self._num_watched += bool(request.params.stop)
        self._num_scored += request.params.prompt_logprobs is not None

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._tracks

    @property
    def request_ids(self) -> set[str]:
        """Requests that have not ended."""
        return set(self._tracks)

    @property
    def is_empty(self) -> bool:
        return not self._deltas

    def take(self) -> tuple[TokenBatch | None, tuple[StreamDelta, ...], tuple[RequestRecord, ...]]:
        """Everything collected since the last call: a commit's plain tokens, other deltas, ended requests, oldest first."""
        taken = self._tokens, tuple(self._deltas), tuple(self._requests)
        self._tokens = None
        self._deltas.clear()
        self._requests.clear()
        return taken

    def admitted(self, seq: Sequence, at_ns: int) -> None:
        """A request began to run. Later admissions, after preemption, change nothing."""
        track = self._tracks[seq.request_id]
        if track.admitted_ns is None:
            track.admitted_ns = at_ns
            track.num_cached_tokens = seq.num_cached_tokens
            self._recorder.count_prompt(seq.num_prompt_tokens, seq.num_cached_tokens)

    def put_commit(self, commit: Commit, now_ns: int) -> list[Sequence]:
        """What a committed step brought; returns sequences whose stop text was found and that still run."""
        for part in commit.prompt_logprobs:
            track = self._tracks[part.seq.request_id]
            if not track.token_ns:  # computed again after a preemption: they were told
                track.prompt_logprobs.update(enumerate(part.entries, part.first))
        for pooled in commit.pooled:
            self._tracks[pooled.seq.request_id].add_pooled(pooled)
        for finish in commit.finished:
            if not finish.has_token:
                self.put_end(finish.seq, finish.reason, None, now_ns)
        decoding = commit.decoding
        special = self._special(commit)
        plain = self._plain(decoding, special)
        if len(plain):
            tokens = commit.token_ids[: len(decoding)]
            self._tokens = TokenBatch(plain.cohort, without(tokens, special), now_ns)
            self._recorder.num_output_tokens += len(tokens) - len(special)
            for token_ns in self._plain_token_ns:
                token_ns.append(now_ns)
        rest = zip(commit.sequences[len(decoding) :], commit.token_ids[len(decoding) :], strict=True)
        grouped = groupby(rest, itemgetter(0))  # a sequence's tokens stand side by side
        news = [(decoding.sequences[i], [commit.token_ids[i]]) for i in special]
        news += [(seq, [token for _, token in tokens]) for seq, tokens in grouped]
        return self._put_special(commit, news, now_ns)

    def _special(self, commit: Commit) -> list[int]:
        """Rows that decoded and bring more than a token: an end, log-probabilities, or text watched for stop texts."""
        sequences = commit.decoding.sequences
        found = {sequences.index(finish.seq) for finish in commit.finished if finish.seq in sequences}
        if commit.logprobs:
            found.update(i for i, seq in enumerate(sequences) if seq.request_id in commit.logprobs)
        if self._num_watched:
            found.update(i for i, seq in enumerate(sequences) if seq.request.params.stop)
        if self._num_scored:
            # The first token of one whose prompt's last token was computed like a decoded one.
            found.update(i for i, seq in enumerate(sequences) if self._tracks[seq.request_id].prompt_logprobs)
        return sorted(found)

    def _plain(self, decoding: DecodeRows, special: list[int]) -> DecodeRows:
        """The other rows that decoded; the same object as long as they are the same."""
        if self._plain_of != (decoding, special):
            self._plain_of = decoding, special
            self._plain_rows = decoding.without(special)
            tracks, sequences = self._tracks, self._plain_rows.sequences
            self._plain_token_ns = [tracks[seq.request.request_id].token_ns for seq in sequences]
        return self._plain_rows

    def _put_special(
        self, commit: Commit, news: list[tuple[Sequence, list[int]]], now_ns: int
    ) -> list[Sequence]:
        """Deltas of their own for these sequences: their first tokens, or such with more than a token."""
        ends = {finish.seq.request_id: finish for finish in commit.finished}
        stopped = []
        for seq, tokens in news:
            request_id = seq.request_id
            track, end = self._tracks[request_id], ends.get(request_id)
            reason = end.reason if end else None
            stop_reason: str | int | None = end.stop_reason if end else None
            text = None
            if track.matcher is None:
                track.token_ns.extend([now_ns] * len(tokens))
            else:
                text, num_read = track.watch_all(tokens, reason, now_ns)
                tokens = tokens[:num_read]
                if track.matcher.matched is not None:
                    reason, stop_reason = FinishReason.STOP, track.matcher.matched
                    if end is None:
                        stopped.append(seq)
            delta = StreamDelta(
                request_id,
                tuple(tokens),
                text,
                tuple(commit.logprobs.get(request_id, ())[: len(tokens)]),
                reason,
                stop_reason,
                num_cached_tokens=track.num_cached_tokens,
                created_ns=now_ns,
                prompt_logprobs=track.prompt_logprobs_in_order() if len(track.token_ns) == 1 else (),
            )
            self._deltas.append(delta)
            self._recorder.num_output_tokens += len(tokens)
            if reason is not None:
                self._close(seq, reason, now_ns, None)
        return stopped

    def put_end(self, seq: Sequence, reason: FinishReason, error: str | None, now_ns: int) -> None:
        """The last delta of a request that ended otherwise than by its own tokens."""
        track = self._tracks[seq.request_id]
        self._deltas.append(
            StreamDelta(
                seq.request_id,
                (),
                track.rest(),
                finish_reason=reason,
                error=error,
                num_cached_tokens=track.num_cached_tokens,
                created_ns=now_ns,
                prompt_logprobs=() if track.token_ns else track.prompt_logprobs_in_order(),
                pooled=track.pooled_vector(reason),
            )
        )
        self._close(seq, reason, now_ns, error)

    def _close(self, seq: Sequence, reason: FinishReason, now_ns: int, error: str | None) -> None:
        track = self._tracks.pop(seq.request_id)
        self._forget_plain()
        self._num_watched -= bool(track.request.params.stop)
        self._num_scored -= track.request.params.prompt_logprobs is not None
        self._recorder.count_finished(reason)
        token_ns = tuple(track.token_ns)
        self._requests.append(
            RequestRecord(
                request_id=seq.request_id,
                arrival_ns=track.request.arrival_ns,
                admitted_ns=track.admitted_ns,
                first_token_ns=token_ns[0] if token_ns else None,
                finished_ns=now_ns,
                num_prompt_tokens=seq.num_prompt_tokens,
                num_cached_tokens=track.num_cached_tokens,
                num_output_tokens=len(token_ns),
                num_preemptions=seq.num_preemptions,
                num_draft_tokens=seq.num_draft_tokens,
                num_accepted_tokens=seq.num_accepted_tokens,
                finish_reason=reason,
                token_ns=token_ns,
                error=error,
                grammar_compile_ms=track.request.grammar_compile_ms,
                lora=None if track.request.lora is None else track.request.lora.name,
                client=track.request.client,
                priority=track.request.priority,
            )
        )
