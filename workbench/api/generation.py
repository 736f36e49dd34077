"""One API answer: its engine requests, streamed or whole, ended early when the client goes away.

`GenerationResponse` is the ASGI response of both endpoints. It watches for the client's disconnect itself and aborts the
engine requests then, so that their blocks are free within a step.

Boundary: from RequestStreams to bytes; the format is the wire's, the checks were made before.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engine.best_of import choose_best
from engine.errors import EngineError
from engine.records import Completion, StreamDelta
from engine.request import FinishReason
from engine.sampling_params import SamplingParams
from workbench.access.limits import Cost, client_in_use, reserved
from workbench.api.answer_log import AnswerLog
from workbench.api.errors import (
    QueueTimeoutError,
    RequestAbortedError,
    RequestFailedError,
    as_asked,
    error_body,
    error_response,
    json_response,
    status_of,
)
from workbench.api.stalled import STALLED_AFTER_S, unless_stalled
from workbench.api.wire import CallDelta, ChoicePart, Usage, Wire
from workbench.chat_output import (
    CallArguments,
    CallBroken,
    CallStart,
    Content,
    OutputParser,
    OutputSyntax,
    Piece,
    Reasoning,
    gather,
)
from workbench.chat_output.reasoning import ReasoningTokens
from workbench.errors import WorkbenchError

if TYPE_CHECKING:
    from engine.stream import RequestStream
    from engine.worker import EngineWorker


# OpenAI's reasons; an output that the caller's own timeout cut is told apart by its stop_reason.
_TOLD: dict[FinishReason | None, str | None] = {
    None: None,
    **{reason: reason.value for reason in FinishReason},
    FinishReason.TIMEOUT: "length",
}
_MAX_WRITE_BYTES = 65536  # of several events; behind it the reader's own speed is heeded
PLAIN = OutputSyntax()
NO_LOG = AnswerLog(None)
log = logging.getLogger(__name__)


@dataclass(slots=True)
class Choice:
    """One engine request of an answer, and how far it has been told."""

    index: int
    stream: RequestStream
    syntax: OutputSyntax = PLAIN  # what its text is split into
    include_reasoning: bool = True
    counts_prompt: bool = True  # of n answers to one prompt, the first counts it
    echo: str | None = None  # the prompt's text, which the answer begins with
    parser: OutputParser | None = field(init=False)
    reasoning_tokens: ReasoningTokens | None = field(init=False)
    num_tokens: int = 0
    num_cached: int = 0
    num_chars: int = 0
    started: bool = False

    def __post_init__(self) -> None:
        self.parser = None if self.syntax.is_plain else self.syntax.parser()
        self.reasoning_tokens = self.syntax.reasoning_tokens()

    def part(self, delta: StreamDelta) -> ChoicePart:
        """What `delta` adds to the answer."""
        part = self._unparsed(delta)
        if self.parser is not None:
            for piece in self._pieces(self.parser, part):
                _add(piece, part)
            self._finish(self.parser, part)
        return part

    def whole(self, completion: Completion) -> ChoicePart:
        """The finished request as one part."""
        part = self._unparsed(
            StreamDelta(
                completion.request_id,
                completion.token_ids,
                completion.text,
                completion.logprobs,
                completion.finish_reason,
                completion.stop_reason,
                num_cached_tokens=completion.num_cached_tokens,
                prompt_logprobs=completion.prompt_logprobs,
            )
        )
        if self.parser is not None:
            found = gather(self._pieces(self.parser, part))
            part.text, part.reasoning = found.content, found.reasoning
            part.tool_calls = [
                CallDelta(i, call.arguments, call.id, call.name) for i, call in enumerate(found.calls)
            ]
            self._finish(self.parser, part)
        return part

    def _unparsed(self, delta: StreamDelta) -> ChoicePart:
        part = ChoicePart(
            self.index,
            text=delta.text or "",
            token_ids=delta.token_ids,
            logprobs=delta.logprobs,
            text_offset=self.num_chars,
            is_first=not self.started,
            finish_reason=_TOLD.get(delta.finish_reason),
            stop_reason="timeout" if delta.finish_reason is FinishReason.TIMEOUT else delta.stop_reason,
        )
        if not self.started and self.echo is not None:
            part.text = self.echo + part.text
            part.prompt_token_ids = self.stream.prompt_token_ids
        part.prompt_logprobs = delta.prompt_logprobs
        if self.reasoning_tokens is not None:
            self.reasoning_tokens.push(delta.token_ids)
        self.num_cached = max(self.num_cached, delta.num_cached_tokens)
        self.num_tokens += len(delta.token_ids)
        self.num_chars += len(part.text)
        self.started = True
        return part

    def _pieces(self, parser: OutputParser, part: ChoicePart) -> list[Piece]:
        """What the part's text, which is taken away, made certain."""
        text, part.text = part.text, ""
        pieces = parser.push(text)
        return pieces + parser.finish() if part.finish_reason is not None else pieces

    def _finish(self, parser: OutputParser, part: ChoicePart) -> None:
        if not self.include_reasoning:
            part.reasoning = ""
        if part.stop_reason is not None and part.stop_reason == self.syntax.stop_after_call:
            part.stop_reason = None  # it is ours
        if part.finish_reason == FinishReason.STOP.value and parser.num_calls:
            part.finish_reason = "tool_calls"


def _add(piece: Piece, part: ChoicePart) -> None:
    """Add a piece to a streamed part."""
    match piece:
        case Content(text):
            part.text += text
        case Reasoning(text):
            part.reasoning += text
        case CallStart(index, call_id, name):
            part.tool_calls.append(CallDelta(index, "", call_id, name))
        case CallArguments(index, text):
            if not part.tool_calls or part.tool_calls[-1].index != index:
                part.tool_calls.append(CallDelta(index))
            part.tool_calls[-1].arguments += text
        case CallBroken():
            pass  # a client that follows a stream has it already, as arguments that are no JSON


def submit_choices(
    worker: EngineWorker,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    request_id: str,
    cache_salt: str = "",
    arrival_ns: int | None = None,
    priority: int = 0,
    client: str = "",
    timeout_s: float | None = None,
    syntax: OutputSyntax = PLAIN,
    include_reasoning: bool = True,
    answer_log: AnswerLog | None = None,
    echoes: Sequence[str] | None = None,
) -> list[Choice]:
    """Submit a request for each of a prompt's ``params.each()``; all of them or none. `arrival_ns`: when the request came in;
    `timeout_s`: what it may take from then on.

    `echoes`: what the answers to each prompt begin with.
    """
    each = params.each()
    num_requests = len(prompts) * len(each)
    engine_ids = [request_id, *(f"{request_id}-{i}" for i in range(1, num_requests))]
    answer_log = answer_log or NO_LOG
    costs = reserved(lambda: _costs(engine_ids, prompts, params, len(each), worker.config.max_model_len))
    with answer_log.expected(engine_ids), costs:
        streams = worker.submit_all(
            prompts, [params] * len(prompts), request_ids=engine_ids, cache_salt=cache_salt, arrival_ns=arrival_ns,
            priority=priority, client=client_in_use(client), timeout_s=timeout_s,
        )  # fmt: skip
    return [
        Choice(
            i, stream, syntax, include_reasoning, counts_prompt=i % len(each) == 0,
            echo=None if echoes is None else echoes[i // len(each)],
        )
        for i, stream in enumerate(streams)
    ]  # fmt: skip


def _costs(
    engine_ids: Sequence[str],
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    num_each: int,
    context: int | None,
) -> list[Cost]:
    """The most that each engine request can use; of `num_each` answers to one prompt, the first pays for it."""
    costs = []
    for place, engine_id in enumerate(engine_ids):
        size = len(prompts[place // num_each])
        room = max(0, (context or size) - size)
        output = room if params.max_tokens is None else min(params.max_tokens, room)
        costs.append(Cost(engine_id, size if place % num_each == 0 else 0, output))
    return costs


class GenerationResponse(Response):
    """Answers from running requests; `stream` says how."""

    def __init__(
        self,
        choices: list[Choice],
        wire: Wire,
        *,
        request_id: str,
        stream: bool,
        include_usage: bool,
        continuous_usage: bool = False,
        answer_log: AnswerLog | None = None,
        best_of: SamplingParams | None = None,
        stalled_after_s: float = STALLED_AFTER_S,
    ) -> None:
        """`best_of`: the params that say how many of each prompt's choices are told; None: all. `stalled_after_s`: how long a
        client may leave what was sent to it unread before its answer is cut.
        """
        super().__init__()
        self._choices = choices
        self._best_of = best_of
        self._answer_log = answer_log or NO_LOG
        self._wire = wire
        self._request_id = request_id
        self._stream = stream
        self._include_usage = include_usage
        self._continuous_usage = continuous_usage  # each chunk tells the usage so far
        self._stalled_after_s = stalled_after_s
        self._gone = False
        self._failed = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.create_task(self._watch(receive))
        try:
            if self._stream:
                if not await unless_stalled(
                    partial(self._send_stream, scope, receive), send, self._stalled_after_s
                ):
                    log.warning("%s: its client reads nothing, it is cut", self._request_id)
                    self._gone = True
            else:
                await self._send_whole(scope, receive, send)
        finally:
            watch.cancel()
            self._abort()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        self._abort()

    def _abort(self) -> None:
        for choice in self._choices:
            if choice.stream.completion is None:
                choice.stream.abort()

    async def _send_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            completions = await asyncio.gather(*(choice.stream.aresult() for choice in self._choices))
            await self._logged()
            has_output = any(completion.token_ids for completion in completions)
            for completion in completions:
                raise_if_failed(completion.finish_reason, completion.error, has_output=has_output)
        except (EngineError, WorkbenchError) as error:
            if not self._gone:
                await error_response(as_asked(error, scope), self._request_id)(scope, receive, send)
            return
        body = self._wire.whole(self._parts(completions), self._usage())
        await json_response(body, headers={"x-request-id": self._request_id})(scope, receive, send)

    def _parts(self, completions: Sequence[Completion]) -> list[ChoicePart]:
        """The choices to tell, numbered through; all of them count as used."""
        parts = {choice.stream.request_id: choice.whole(c) for choice, c in zip(self._choices, completions)}
        params = self._best_of
        if params is None or not params.chooses:
            return list(parts.values())
        size = len(params.each())
        groups = [completions[i : i + size] for i in range(0, len(completions), size)]
        best = [parts[c.request_id] for group in groups for c in choose_best(group, params)]
        for index, part in enumerate(best):
            part.index = index
        return best

    async def _send_stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        if await self._choices[0].stream.timed_out():  # a status can still tell it
            await self._send_whole(scope, receive, send)
            return
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
            (b"x-request-id", self._request_id.encode()),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if beginning := self._wire.begin():
            await send({"type": "http.response.body", "body": beginning, "more_body": True})
        if len(self._choices) == 1:
            await self._pump(self._choices[0], send)
        else:
            await asyncio.gather(*(self._pump(choice, send) for choice in self._choices))
        await self._logged()
        rest = b""
        if self._include_usage and not self._failed:
            rest += self._wire.usage_chunk(self._usage())
        await send({"type": "http.response.body", "body": rest + self._wire.done})

    async def _pump(self, choice: Choice, send: Send) -> None:
        """Send what comes. What came while this loop was busy goes out in one write: who is late does not become later."""
        unsent = b""
        try:
            async for delta in choice.stream:
                if delta.finish_reason is not None:
                    has_output = bool(choice.num_tokens or delta.token_ids)
                    raise_if_failed(delta.finish_reason, delta.error, has_output=has_output)
                part = choice.part(delta)
                if self._continuous_usage:
                    part.usage = self._usage()
                unsent += self._wire.chunk(part)
                if choice.stream.has_more and len(unsent) < _MAX_WRITE_BYTES:
                    continue
                body, unsent = unsent, b""
                if body and not self._gone:
                    await send({"type": "http.response.body", "body": body, "more_body": True})
        except (EngineError, WorkbenchError) as error:
            self._failed = True
            if not self._gone:
                body = unsent + self._wire.error_chunk(error_body(error, status_of(error)))
                await send({"type": "http.response.body", "body": body, "more_body": True})

    async def _logged(self) -> None:
        """The answer's end is told only when its rows outlast this process."""
        self._answer_log.ended(
            choice.stream.completion for choice in self._choices if choice.stream.completion
        )
        if not self._gone:
            await self._answer_log.written()

    def _usage(self) -> Usage:
        usage = Usage()
        for choice in self._choices:
            usage.completion_tokens += choice.num_tokens
            if choice.counts_prompt:
                usage.prompt_tokens += len(choice.stream.prompt_token_ids)
                usage.cached_tokens += choice.num_cached
            if choice.reasoning_tokens is not None:
                usage.reasoning_tokens = (usage.reasoning_tokens or 0) + choice.reasoning_tokens.count
        return usage


def raise_if_failed(reason: FinishReason, error: str | None, *, has_output: bool = False) -> None:
    """Raise what an answer tells of a request that failed. `has_output`: one whose time was over is answered with what there is."""
    if reason is FinishReason.ERROR:
        raise RequestFailedError(
            f"the step that served this request failed: {error}", value=error,
            remedy="Send it again; if it fails again, the server's log has the cause.",
        )  # fmt: skip
    if reason is FinishReason.TIMEOUT and not has_output:
        raise QueueTimeoutError(
            f"the request has no output: {error}",
            value=error,
            remedy="The server is busy; send it again later.",
        )
    if reason is FinishReason.ABORT:
        raise RequestAbortedError(
            f"the request was aborted{f': {error}' if error else ''}",
            remedy="The server may be stopping; send it again.",
        )
