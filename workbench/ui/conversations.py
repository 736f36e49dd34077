"""Conversations of the Playground: kept in memory by id, so that a rerun or a reload loses nothing; and the answers
that run in them.

An `Answer` reads its stream in a thread of its own. The page only looks at it (`follow`), so a rerun neither waits for
the engine nor stops the answer; `stop` aborts the request. An answer that nobody looks at any more is aborted after
`UNATTENDED_S`. Bounded: the oldest conversation goes when there are more than `MAX_CONVERSATIONS`.

No Streamlit here, and no HTML. Memory only: a restart of the app forgets.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from engine.errors import InvalidRequestError
from engine.request import FinishReason

if TYPE_CHECKING:
    from engine.records import Completion
    from engine.sampling_params import SamplingParams
    from engine.stream import RequestStream
    from engine.tokenizer import TokenizerLike
    from engine.worker import EngineWorker

MAX_CONVERSATIONS = 100
UNATTENDED_S = 300.0


@dataclass(frozen=True, slots=True)
class TokenView:
    """One output token as people see it: its piece of the text, its probability, and what else was likely."""

    text: str  # "" for a token that is not part of the text, such as the end of it
    log_probability: float
    rank: int
    alternatives: tuple[tuple[str, float], ...]  # (text, log-probability), best first
    is_last: bool = False


class Answer:
    """A running or finished answer. The reader thread writes; pages read."""

    def __init__(
        self, stream: RequestStream, tokenizer: TokenizerLike, unattended_s: float = UNATTENDED_S
    ) -> None:
        self.request_id = stream.request_id
        self.text = ""
        self.num_tokens = 0
        self.completion: Completion | None = None
        self.error: str | None = None
        self._stream = stream
        self._tokenizer = tokenizer
        self._unattended_s = unattended_s
        self._tokens: tuple[TokenView, ...] | None = None
        self._attended = time.monotonic()
        self._changed = threading.Condition()
        self._done = False
        threading.Thread(target=self._read, name=f"quire-answer-{self.request_id}", daemon=True).start()

    @property
    def running(self) -> bool:
        return not self._done

    @property
    def was_stopped(self) -> bool:
        return self.completion is not None and self.completion.finish_reason is FinishReason.ABORT

    def stop(self, wait_s: float = 1.0) -> None:
        """Abort the request and wait a moment for its end. What was generated stays."""
        self._stream.abort()
        with self._changed:
            self._changed.wait_for(lambda: self._done, wait_s)

    def follow(self, interval_s: float = 0.1) -> Iterator[str]:
        """The text so far, at most once an interval and at least every fifth one, until the answer ends."""
        while self.running:
            self._attended = time.monotonic()
            yield self.text
            with self._changed:
                self._changed.wait_for(lambda: self._done, interval_s)

    def tokens(self) -> tuple[TokenView, ...]:
        """The tokens of a finished answer with their probabilities; none if they were not recorded."""
        if self._tokens is None:
            completion = self.completion
            if completion is None:
                return ()
            self._tokens = token_views(completion, self._tokenizer)
        return self._tokens

    def _read(self) -> None:
        try:
            for delta in self._stream:
                self.text += delta.text or ""
                self.num_tokens += len(delta.token_ids)
                if delta.error is not None:
                    self.error = delta.error
                if time.monotonic() - self._attended > self._unattended_s:
                    self._stream.abort()
            self.completion = self._stream.completion
        except Exception as error:  # noqa: BLE001 - the thread's boundary: the page shows it
            self.error = str(error) or type(error).__name__
            self.completion = self._stream.completion
        finally:
            if self.completion is not None:
                self.text = self.completion.text
                self.num_tokens = len(self.completion.token_ids)
                self.error = self.error or self.completion.error
            with self._changed:
                self._done = True
                self._changed.notify_all()


def token_views(completion: Completion, tokenizer: TokenizerLike) -> tuple[TokenView, ...]:
    """Pieces whose concatenation is a prefix of the answer's text, so that a cut stop text is not shown as said."""
    detokenizer = tokenizer.detokenizer()
    views: list[TokenView] = []
    room = len(completion.text)
    pairs = list(zip(completion.token_ids, completion.logprobs, strict=False))
    for place, (token_id, entry) in enumerate(pairs, start=1):
        piece = detokenizer.push([token_id])[:room]
        room -= len(piece)
        texts = (tokenizer.token_text(top) for top in entry.top_ids)
        alternatives = tuple(zip(texts, entry.top_logprobs, strict=True))
        views.append(TokenView(piece, entry.logprob, entry.rank, alternatives, is_last=place == len(pairs)))
    return tuple(views)


@dataclass(slots=True)
class Turn:
    """One question and its answer, or why there is none. `given` turns came with a prompt chip and have no answer."""

    messages: tuple[Mapping[str, Any], ...]  # what this turn adds before the answer
    answer: Answer | None = None
    error: str | None = None
    expected: str | None = None


@dataclass(slots=True)
class Conversation:
    """Turns under one system prompt with one model."""

    id: str
    turns: list[Turn] = field(default_factory=list)
    tools: tuple[Mapping[str, Any], ...] = ()

    @property
    def running(self) -> Answer | None:
        last = self.turns[-1].answer if self.turns else None
        return last if last is not None and last.running else None

    def messages(self, system: str = "", then: tuple[Mapping[str, Any], ...] = ()) -> list[dict[str, Any]]:
        """Everything so far in the API's form, and what follows; an answer that has not ended is left out.

        A task's own system prompt wins over `system`: there is one.
        """
        found: list[dict[str, Any]] = []
        for turn in self.turns:
            if turn.error is not None:
                continue
            found += [dict(message) for message in turn.messages]
            if turn.answer is not None and not turn.answer.running and turn.answer.text:
                found.append({"role": "assistant", "content": turn.answer.text})
        found += [dict(message) for message in then]
        if system and found and not any(message["role"] == "system" for message in found):
            found.insert(0, {"role": "system", "content": system})
        return found


def new_conversation() -> Conversation:
    """An empty one under an unguessable id, in no store yet."""
    return Conversation(secrets.token_urlsafe(12))


class Conversations:
    """The store. Thread-safe."""

    def __init__(self, limit: int = MAX_CONVERSATIONS) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._by_id: OrderedDict[str, Conversation] = OrderedDict()

    def get(self, conversation_id: str | None) -> Conversation | None:
        with self._lock:
            found = self._by_id.get(conversation_id or "")
            if found is not None:
                self._by_id.move_to_end(found.id)
            return found

    def keep(self, conversation: Conversation) -> None:
        """Store it; the least recently used one goes when there are too many, its answer aborted."""
        gone: list[Conversation] = []
        with self._lock:
            self._by_id[conversation.id] = conversation
            while len(self._by_id) > self._limit:
                gone.append(self._by_id.popitem(last=False)[1])
        _stop(gone)

    def close(self) -> None:
        """Abort every running answer and forget all."""
        with self._lock:
            gone = list(self._by_id.values())
            self._by_id.clear()
        _stop(gone)


def _stop(conversations: list[Conversation]) -> None:
    for conversation in conversations:
        if conversation.running is not None:
            conversation.running.stop(wait_s=0.0)


def ask(
    worker: EngineWorker,
    conversation: Conversation,
    messages: tuple[Mapping[str, Any], ...],
    params: SamplingParams,
    *,
    system: str = "",
    expected: str | None = None,
) -> Turn:
    """Add a turn and start its answer. Never waits for the engine.

    Raises:
        EngineError: the request can never run, or the engine is gone; nothing is added then.
    """
    prompt = conversation.messages(system, then=messages)
    tokenizer = worker.tokenizer
    if tokenizer is None:
        raise InvalidRequestError(
            "this engine has no tokenizer", remedy="Load a model that has one.", param="model"
        )
    stream = worker.submit(
        tokenizer.apply_chat_template(prompt, tools=list(conversation.tools) or None), params
    )
    turn = Turn(messages, Answer(stream, tokenizer), expected=expected)
    conversation.turns.append(turn)
    return turn
