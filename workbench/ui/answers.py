"""Answers of the Playground: each is submitted and read in a thread of its own, whatever the page does meanwhile.

The page only looks at answers (`follow`), so a rerun neither waits for an engine nor stops one; `stop` aborts the request.
What cannot be submitted ends as a refusal of this answer alone. An answer that nobody looks at any more is aborted after
`UNATTENDED_S`.

No Streamlit here, and no HTML.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import uuid4

from engine.errors import TypedError
from workbench.chat_output import ParsedOutput, Reasoning, gather

if TYPE_CHECKING:
    from engine.plan import TokenLogprobs
    from engine.records import Completion, StreamDelta
    from engine.sampling_params import SamplingParams
    from engine.stream import RequestStream
    from engine.tokenizer import TokenizerLike
    from workbench.chat_output import OutputParser, Piece
    from workbench.ui.endpoint_stream import EndpointStream

UNATTENDED_S = 300.0
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Begun:
    """A submitted request, and what reads its output: an engine's, or an endpoint's (`endpoint_stream`), which is all three."""

    stream: RequestStream | EndpointStream
    tokenizer: TokenizerLike | EndpointStream
    parser: OutputParser | EndpointStream


Begin = Callable[[str], Begun]  # by the request's id; raises what refuses the request


class Answer:
    """A running, finished or refused answer. Its thread writes; pages read."""

    def __init__(self, begin: Begin, params: SamplingParams, unattended_s: float = UNATTENDED_S) -> None:
        self.request_id = uuid4().hex
        self.params = params
        self.text = ""  # as the model wrote it
        self.num_tokens = 0
        self.num_reasoning_tokens = 0
        self.reasoning_ms = 0.0  # from the first token to the last one of the reasoning
        self.completion: Completion | None = None
        self.refusal: Exception | None = None  # nothing was generated
        self.error: str | None = None  # of a step that failed while it was generated
        self.painted: str | None = None  # a page's memo: what it made of the answer after its end
        self._begin = begin
        self._begun: Begun | None = None
        self._is_unwanted = False
        self._pieces: list[Piece] = []
        self._output: ParsedOutput | None = None
        self._first_ns = 0
        self._unattended_s = unattended_s
        self._attended = time.monotonic()
        self._done = threading.Event()
        threading.Thread(target=self._run, name=f"quire-answer-{self.request_id}", daemon=True).start()

    @property
    def running(self) -> bool:
        return not self._done.is_set()

    @property
    def output(self) -> ParsedOutput:
        """What the text says so far."""
        if self._output is not None:
            return self._output
        has_ended = not self.running
        found = gather(self._pieces)
        self._output = found if has_ended else None
        return found

    def stop(self, wait_s: float = 1.0) -> None:
        """Abort the request and wait a moment for its end. What was generated stays."""
        self._is_unwanted = True
        if self._begun is not None:
            self._begun.stream.abort()
        self._done.wait(wait_s)

    def attend(self) -> None:
        """Somebody looks at it."""
        self._attended = time.monotonic()

    def wait(self, timeout_s: float) -> bool:
        """Whether it ended within that time."""
        return self._done.wait(timeout_s)

    def tokens(self) -> tuple[TokenView, ...]:
        """The tokens of a finished answer with their probabilities; none if they were not recorded."""
        if self.completion is None or self._begun is None:
            return ()
        skip_special_tokens = self._begun.stream.params.skip_special_tokens
        return token_views(self.completion, self._begun.tokenizer, skip_special_tokens)

    def prompt_tokens(self) -> tuple[TokenView, ...]:
        """The prompt's tokens but the first, with their probabilities; none if they were not asked for."""
        if self.completion is None or self._begun is None or not self.completion.prompt_logprobs:
            return ()
        return prompt_views(self.completion, self._begun.tokenizer)

    def _run(self) -> None:
        try:
            self._begun = self._begin(self.request_id)
            self._read(self._begun)
        except Exception as error:  # the thread's boundary: the page shows it
            if not isinstance(error, TypedError):
                log.exception("the answer %s failed", self.request_id)
            if self._begun is None:
                self.refusal = error
            else:
                self.error = str(error) or type(error).__name__
        finally:
            if self._begun is not None:
                self.completion = self._begun.stream.completion
            if self.completion is not None:
                self.num_tokens = len(self.completion.token_ids)
                self.error = self.error or self.completion.error
            self._done.set()

    def _read(self, begun: Begun) -> None:
        if self._is_unwanted:  # `stop` saw no stream yet
            begun.stream.abort()
        for delta in begun.stream:
            self.text += delta.text or ""
            self.num_tokens += len(delta.token_ids)
            self._add(begun.parser.push(delta.text or ""), delta)
            if delta.finish_reason is not None:
                self._add(begun.parser.finish(), delta)
            if time.monotonic() - self._attended > self._unattended_s:
                begun.stream.abort()

    def _add(self, pieces: list[Piece], delta: StreamDelta) -> None:
        self._first_ns = self._first_ns or delta.created_ns
        self._pieces += pieces
        if any(isinstance(piece, Reasoning) for piece in pieces):
            self.num_reasoning_tokens = self.num_tokens
            self.reasoning_ms = (delta.created_ns - self._first_ns) / 1e6


def follow(answers: Sequence[Answer], interval_s: float = 0.1) -> Iterator[None]:
    """Look at all of them at once, once an interval, until one of them ends."""
    while answers and all(answer.running for answer in answers):
        for answer in answers:
            answer.attend()
        yield
        answers[0].wait(interval_s)


@dataclass(frozen=True, slots=True)
class TokenView:
    """One output token as people see it: its piece of the text, its probability, and what else was likely."""

    text: str  # "" for a token that is not part of the text, such as the end of it
    log_probability: float
    rank: int
    alternatives: tuple[tuple[str, float], ...]  # (text, log-probability), best first
    is_last: bool = False


def token_views(
    completion: Completion, tokenizer: TokenizerLike | EndpointStream, skip_special_tokens: bool = True
) -> tuple[TokenView, ...]:
    """Pieces whose concatenation is a prefix of the answer's text, so that a cut stop text is not shown as said."""
    detokenizer = tokenizer.detokenizer(skip_special_tokens)
    views: list[TokenView] = []
    room = len(completion.text)
    pairs = list(zip(completion.token_ids, completion.logprobs, strict=False))
    for place, (token_id, entry) in enumerate(pairs, start=1):
        piece = detokenizer.push([token_id])[:room]
        room -= len(piece)
        views.append(_view(piece, entry, tokenizer, is_last=place == len(pairs)))
    return tuple(views)


def prompt_views(completion: Completion, tokenizer: TokenizerLike | EndpointStream) -> tuple[TokenView, ...]:
    """The prompt as the template wrote it, special tokens included, from its second token on: the first has no probability."""
    detokenizer = tokenizer.detokenizer(False)
    detokenizer.push(completion.prompt_token_ids[:1])
    return tuple(
        _view(detokenizer.push([entry.token_id]), entry, tokenizer) for entry in completion.prompt_logprobs
    )


def _view(
    piece: str, entry: TokenLogprobs, tokenizer: TokenizerLike | EndpointStream, is_last: bool = False
) -> TokenView:
    texts = (tokenizer.token_text(top) for top in entry.top_ids)
    alternatives = tuple(zip(texts, entry.top_logprobs, strict=True))
    return TokenView(piece, entry.logprob, entry.rank, alternatives, is_last)
