"""Conversations of the Playground with one to four versions: kept in memory by id, so that a rerun or a reload loses nothing.

Every version is asked the same questions and sees its own answers only; where it calls tools, their results are said to it
alone. Bounded: the oldest conversation goes when there are more than `MAX_CONVERSATIONS`.

No Streamlit here, and no HTML. Memory only: a restart of the app forgets.
"""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from workbench.backends.endpoints import Endpoint
from workbench.chat_request import Message, prepare
from workbench.ui.answers import Answer, Begun
from workbench.ui.endpoint_stream import EndpointStream

if TYPE_CHECKING:
    from engine.sampling_params import SamplingParams
    from engine.worker import EngineWorker
    from workbench.resident import Resident

MAX_CONVERSATIONS = 100
Find = Callable[
    [str], "EngineWorker | Endpoint"
]  # who answers for a model's id, `fleet_view.find`; raises where nobody does


@dataclass(frozen=True, slots=True)
class Exchange:
    """What was said to one version, and its answer; the conversation goes on with the first of several."""

    said: tuple[Message, ...]
    answer: Answer
    others: tuple[Answer, ...] = ()

    @property
    def answers(self) -> tuple[Answer, ...]:
        return (self.answer, *self.others)

    def messages(self) -> list[dict[str, Any]]:
        """In the API's form; nothing of what was refused, and no answer that has not ended or says nothing."""
        if self.answer.refusal is not None:
            return []
        found = [dict(message) for message in self.said]
        output = self.answer.output
        if not self.answer.running and (output.content or output.calls):
            told: dict[str, Any] = {"role": "assistant", "content": output.content}
            if output.calls:
                told["tool_calls"] = [
                    {
                        "id": call.id,
                        "type": "function",
                        "function": {"name": call.name, "arguments": call.arguments},
                    }
                    for call in output.calls
                ]
            found.append(told)
        return found


@dataclass(slots=True)
class Reply:
    """One version's way through a turn: its answer to the question, then one after each round of tool results."""

    model: str  # what requests call it
    version: Resident  # what that was when it was asked
    exchanges: list[Exchange] = field(default_factory=list)

    @property
    def last(self) -> Answer:
        return self.exchanges[-1].answer


@dataclass(slots=True)
class Turn:
    """One question to all versions that were chosen then, and what each of them made of it."""

    messages: tuple[Message, ...]
    expected: str | None = None
    replies: dict[str, Reply] = field(default_factory=dict)  # by model


@dataclass(slots=True)
class Conversation:
    """Turns under one system prompt."""

    id: str
    turns: list[Turn] = field(default_factory=list)
    tools: tuple[Message, ...] = ()  # of the task that it began with

    @property
    def running(self) -> list[Answer]:
        replies = self.turns[-1].replies.values() if self.turns else ()
        return [answer for reply in replies for answer in reply.exchanges[-1].answers if answer.running]

    def messages(self, model: str, system: str = "", then: tuple[Message, ...] = ()) -> list[dict[str, Any]]:
        """Everything between a model and the person so far, and what follows.

        A task's own system prompt wins over `system`: there is one.
        """
        replies = (turn.replies[model] for turn in self.turns if model in turn.replies)
        found = [
            message for reply in replies for exchange in reply.exchanges for message in exchange.messages()
        ]
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
        """Store it; the least recently used one goes when there are too many, its answers aborted."""
        gone: list[Conversation] = []
        with self._lock:
            self._by_id[conversation.id] = conversation
            while len(self._by_id) > self._limit:
                gone.append(self._by_id.popitem(last=False)[1])
        for each in gone:
            stop(each)

    def close(self) -> None:
        """Abort every running answer and forget all."""
        with self._lock:
            gone = list(self._by_id.values())
            self._by_id.clear()
        for each in gone:
            stop(each)


def stop(conversation: Conversation, wait_s: float = 0.0) -> None:
    """Abort what runs in it; wait a moment for the end of each."""
    running = conversation.running
    for answer in running:
        answer.stop(wait_s=0.0)
    for answer in running:
        answer.wait(wait_s)


@dataclass(frozen=True, slots=True)
class Request:
    """How something is asked, whoever answers."""

    params: SamplingParams
    system: str = ""
    tools: tuple[Message, ...] = ()


def ask(
    find: Find,
    conversation: Conversation,
    versions: Mapping[str, Resident],
    messages: tuple[Message, ...],
    request: Request,
    *,
    expected: str | None = None,
) -> Turn:
    """Add a turn and start every version's answer. Never waits for an engine; what is refused is told in its answer."""
    turn = Turn(messages, expected)
    for model, version in versions.items():
        turn.replies[model] = reply = Reply(model, version)
        say(find, conversation, reply, messages, request)
    conversation.turns.append(turn)
    return turn


def say(
    find: Find, conversation: Conversation, reply: Reply, messages: tuple[Message, ...], request: Request
) -> None:
    """Say something to one version alone and start its answers: to a turn's question, or to the results of the tools it called."""
    prompt = conversation.messages(reply.model, request.system, then=messages)

    def begin(params: SamplingParams, request_id: str) -> Begun:
        worker = find(reply.model)
        if isinstance(worker, Endpoint):
            there = EndpointStream(worker, reply.model, prompt, params, request.tools, request_id=request_id)
            return Begun(there, there, there)
        ready = prepare(worker, prompt, params, request.tools)
        stream = worker.submit(ready.prompt_ids, ready.params, request_id=request_id)
        return Begun(stream, ready.tokenizer, ready.syntax.parser())

    first, *others = (Answer(partial(begin, params), params) for params in request.params.each())
    reply.exchanges.append(Exchange(messages, first, tuple(others)))
