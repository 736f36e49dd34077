"""How an answer of /v1/responses looks: items one after another, and the events that tell how each of them grows.

An answer's items are thoughts, a message and calls, in the order in which the model wrote them. A token of a stream costs one
f-string: what its item's events have in common is written when the item begins.

Boundary: formats only, as `wire`. One object serves one answer: it keeps the items and counts the events.
Source: OpenAI, Responses API, "Streaming events"; openai-python's ``types.responses``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring_ascii as quote
from typing import Any

from engine.plan import TokenLogprobs
from workbench.api.wire import CallDelta, ChoicePart, Head, TokenText, Usage, chat_token

_DELTAS = {
    "message": "response.output_text.delta",
    "reasoning": "response.reasoning_text.delta",
    "function_call": "response.function_call_arguments.delta",
}


@dataclass(slots=True)
class _Item:
    """An item of the output that still grows."""

    value: dict[str, Any]  # as clients get it; its text is filled in at the end
    place: dict[str, Any]  # what all of its events say
    head: str  # of its deltas' data
    call: int | None = None  # of a call: its number among the answer's calls
    texts: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)


class ResponsesWire:
    """A ``response`` object, whole or as events."""

    done = b""  # the last event says that it is

    def __init__(
        self, head: Head, asked: dict[str, Any], token_text: TokenText, *, wants_logprobs: bool
    ) -> None:
        """`asked`: the fields that tell the request again. Log-probabilities are those of the steps that brought text."""
        self._head = head
        self._asked = asked
        self._token_text = token_text
        self._wants_logprobs = wants_logprobs
        self._output: list[dict[str, Any]] = []  # items that are whole
        self._item: _Item | None = None
        self._held: list[TokenLogprobs] = []  # of tokens whose text is not certain yet
        self._events: list[str] = []
        self._num_events = 0
        self._status = "in_progress"

    def begin(self) -> bytes:
        """The first events of a stream."""
        for kind in ("response.created", "response.in_progress"):
            self._tell(kind, response=self._response(None))
        return self._told()

    def chunk(self, part: ChoicePart) -> bytes:
        self._take(part)
        return self._told()

    def usage_chunk(self, usage: Usage) -> bytes:
        """The last event: the whole response."""
        self._tell(f"response.{self._status}", response=self._response(usage))
        return self._told()

    def whole(self, parts: Sequence[ChoicePart], usage: Usage) -> dict[str, Any]:
        self._take(parts[0])
        return self._response(usage)

    def error_chunk(self, body: dict[str, Any]) -> bytes:
        """The last event of an answer that failed; items that were not whole are left out."""
        self._status = "failed"
        error = {"code": "server_error", "message": body["error"]["message"]}
        self._tell("response.failed", response={**self._response(None), "error": error})
        return self._told()

    def _take(self, part: ChoicePart) -> None:
        if self._wants_logprobs:
            self._held += part.logprobs
        if part.reasoning:
            self._held.clear()
            self._grow(self._item_for("reasoning"), part.reasoning)
        if part.text:
            item = self._item_for("message")
            logprobs = [chat_token(entry, self._token_text) for entry in self._held]
            self._held.clear()
            item.logprobs += logprobs
            self._grow(item, part.text, f',"logprobs":{_json(logprobs)}')
        for call in part.tool_calls:
            self._held.clear()
            self._call(call)
        if part.finish_reason is not None:
            self._end(part.finish_reason)

    def _call(self, call: CallDelta) -> None:
        item = self._item
        if item is None or item.call != call.index:
            item = self._begin(
                {"type": "function_call", "id": f"fc_{call.id}", "call_id": call.id, "name": call.name, "arguments": ""}
            )  # fmt: skip
            item.call = call.index
        if call.arguments:
            self._grow(item, call.arguments)

    def _item_for(self, kind: str) -> _Item:
        """The item that grows, if it is of that kind, else a new one."""
        if self._item is not None and self._item.value["type"] == kind:
            return self._item
        name = f"{len(self._output) + (self._item is not None)}_{self._head.id.removeprefix('resp_')}"
        if kind == "reasoning":
            return self._begin({"type": kind, "id": f"rs_{name}", "summary": [], "content": []})
        return self._begin({"type": kind, "id": f"msg_{name}", "role": "assistant", "content": []})

    def _begin(self, value: dict[str, Any]) -> _Item:
        self._close("completed")
        place: dict[str, Any] = {"item_id": value["id"], "output_index": len(self._output)}
        self._tell(
            "response.output_item.added", output_index=len(self._output), item={**value, "status": "in_progress"}
        )  # fmt: skip
        if "content" in value:
            place["content_index"] = 0
        item = _Item(value, place, _json({"type": _DELTAS[value["type"]], **place})[:-1])
        if "content" in value:
            self._tell("response.content_part.added", **place, part=_part(item))
        self._item = item
        return item

    def _grow(self, item: _Item, text: str, more: str = "") -> None:
        item.texts.append(text)
        kind = _DELTAS[item.value["type"]]
        self._events.append(
            f'event: {kind}\ndata: {item.head},"sequence_number":{self._num_events},"delta":{quote(text)}{more}}}\n\n'
        )
        self._num_events += 1

    def _close(self, status: str) -> None:
        """The item that grows is at its end."""
        item = self._item
        if item is None:
            return
        self._item, value, text = None, item.value, "".join(item.texts)
        if "content" in value:
            part = _part(item)
            value["content"] = [part]
            if value["type"] == "message":
                self._tell("response.output_text.done", **item.place, text=text, logprobs=item.logprobs)
            else:
                self._tell("response.reasoning_text.done", **item.place, text=text)
            self._tell("response.content_part.done", **item.place, part=part)
        else:
            value["arguments"] = text
            name = value["name"]
            self._tell("response.function_call_arguments.done", **item.place, name=name, arguments=text)
        value["status"] = status
        self._tell("response.output_item.done", output_index=len(self._output), item=value)
        self._output.append(value)

    def _end(self, finish_reason: str) -> None:
        if self._item is None and not self._output:
            self._item_for("message")  # an answer without a word is a message still
        self._status = "incomplete" if finish_reason == "length" else "completed"
        self._close(self._status)

    def _response(self, usage: Usage | None) -> dict[str, Any]:
        is_cut = self._status == "incomplete"
        return {
            "id": self._head.id,
            "object": "response",
            "created_at": self._head.created,
            "completed_at": int(time.time()) if self._status == "completed" else None,
            "status": self._status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "model": self._head.model,
            "output": self._output,
            **self._asked,
            "usage": None if usage is None else _usage(usage),
        }

    def _tell(self, kind: str, **more: Any) -> None:
        event = {"type": kind, "sequence_number": self._num_events, **more}
        self._events.append(f"event: {kind}\ndata: {_json(event)}\n\n")
        self._num_events += 1

    def _told(self) -> bytes:
        events, self._events = self._events, []
        return "".join(events).encode()


def _part(item: _Item) -> dict[str, Any]:
    """The content of an item with the text that it has."""
    text = "".join(item.texts)
    if item.value["type"] == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": item.logprobs}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        # a cache that is written to on request is not there: none of its tokens were
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens or 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
