"""How answers look on the wire: OpenAI's objects and server-sent events, with the constant parts serialised once.

A token of a stream costs one f-string and one encode: id, model and time are written when the response begins.

Boundary: formats only. Nothing here waits, reads the network or knows the engine's threads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring_ascii as quote
from typing import Any, ClassVar, Protocol

from engine.plan import TokenLogprobs

DONE = b"data: [DONE]\n\n"
TokenText = Callable[[int], str]


@dataclass(slots=True)
class CallDelta:
    """What one step added to a tool call, or a whole call."""

    index: int
    arguments: str = ""
    id: str | None = None  # with the name, once
    name: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Without its index, as it is in a message."""
        if self.name is None:
            return {"function": {"arguments": self.arguments}}
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(slots=True)
class ChoicePart:
    """What one step added to one choice, or a whole choice when the answer is not streamed."""

    index: int
    text: str = ""
    reasoning: str = ""
    tool_calls: list[CallDelta] = field(default_factory=list)
    token_ids: Sequence[int] = ()
    logprobs: Sequence[TokenLogprobs] = ()
    text_offset: int = 0  # characters of this choice that went before
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    is_first: bool = False
    prompt_token_ids: Sequence[int] = ()  # where `text` begins with the prompt's
    prompt_logprobs: Sequence[TokenLogprobs] = ()  # of its tokens but the first
    usage: Usage | None = None  # of the answer so far, where each chunk tells it


@dataclass(slots=True)
class Usage:
    """Token counts of a response."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int | None = None  # of the completion's; None: they are not counted

    def as_dict(self) -> dict[str, Any]:
        counts: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
        if self.reasoning_tokens is not None:
            counts["completion_tokens_details"] = {"reasoning_tokens": self.reasoning_tokens}
        return counts


@dataclass(frozen=True, slots=True)
class Head:
    """The constants of one response."""

    id: str
    created: int
    model: str


class Wire(Protocol):
    """One endpoint's format."""

    def begin(self) -> bytes:
        """What a stream begins with, before there is anything to say; asked once."""
        ...

    @property
    def done(self) -> bytes:
        """What a stream ends with."""
        ...

    def chunk(self, part: ChoicePart) -> bytes:
        """One event of a stream; b"" when there is nothing to say."""
        ...

    def usage_chunk(self, usage: Usage) -> bytes: ...

    def whole(self, parts: Sequence[ChoicePart], usage: Usage) -> dict[str, Any]: ...

    def error_chunk(self, body: dict[str, Any]) -> bytes:
        """An error in the middle of a stream; `body`: as a whole answer would have it."""
        ...


@dataclass(slots=True)
class _Base:
    head: Head
    object_name: str
    chunk_name: str
    token_text: TokenText
    wants_logprobs: bool
    include_usage: bool
    num_prompt_logprobs: int | None = None  # vLLM's, in whole answers; None: not asked for
    _prefix: str = field(init=False)
    _suffix: str = field(init=False)
    done: ClassVar[bytes] = DONE

    def __post_init__(self) -> None:
        head = {
            "id": self.head.id,
            "object": self.chunk_name,
            "created": self.head.created,
            "model": self.head.model,
        }
        self._prefix = f"data: {json.dumps(head, separators=(',', ':'))[:-1]},"
        self._suffix = "]" + (',"usage":null' if self.include_usage else "") + "}\n\n"

    def begin(self) -> bytes:
        return b""

    def _end(self, part: ChoicePart) -> str:
        """Of a chunk, behind its choice."""
        return self._suffix if part.usage is None else f'],"usage":{_json(part.usage.as_dict())}}}\n\n'

    def usage_chunk(self, usage: Usage) -> bytes:
        return f'{self._prefix}"choices":[],"usage":{_json(usage.as_dict())}}}\n\n'.encode()

    def error_chunk(self, body: dict[str, Any]) -> bytes:
        """As OpenAI's clients recognise it."""
        return f"data: {_json(body)}\n\n".encode()

    def _prompt_logprobs(self, part: ChoicePart) -> list[dict[str, Any] | None]:
        """vLLM's form: for each prompt token its own figures and those of the most likely ones, by token id; none for the first."""
        assert self.num_prompt_logprobs is not None
        found: list[dict[str, Any] | None] = [None]
        for entry in part.prompt_logprobs:
            figures = {entry.token_id: (entry.logprob, entry.rank)}
            tops = zip(entry.top_ids[: self.num_prompt_logprobs], entry.top_logprobs)
            for rank, (token_id, logprob) in enumerate(tops, 1):
                figures.setdefault(token_id, (logprob, rank))
            found.append(
                {
                    str(token_id): {
                        "logprob": finite(logprob), "rank": rank, "decoded_token": self.token_text(token_id)
                    }
                    for token_id, (logprob, rank) in figures.items()
                }
            )  # fmt: skip
        return found

    def _whole(self, choices: list[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        return {
            "id": self.head.id,
            "object": self.object_name,
            "created": self.head.created,
            "model": self.head.model,
            "choices": choices,
            "usage": usage.as_dict(),
        }


class ChatWire(_Base):
    """``chat.completion`` and ``chat.completion.chunk``."""

    def __init__(
        self,
        head: Head,
        token_text: TokenText,
        *,
        wants_logprobs: bool,
        include_usage: bool,
        num_prompt_logprobs: int | None = None,
    ) -> None:
        super().__init__(
            head, "chat.completion", "chat.completion.chunk", token_text, wants_logprobs, include_usage,
            num_prompt_logprobs,
        )  # fmt: skip

    def chunk(self, part: ChoicePart) -> bytes:
        delta = _chat_delta(part)
        if delta == "{}" and part.finish_reason is None and not part.logprobs:
            return b""
        logprobs = _json(self._logprobs(part)) if self.wants_logprobs and part.logprobs else "null"
        return (
            f'{self._prefix}"choices":[{{"index":{part.index},"delta":{delta},"logprobs":{logprobs},'
            f'"finish_reason":{_finish(part)}}}{self._end(part)}'
        ).encode()

    def whole(self, parts: Sequence[ChoicePart], usage: Usage) -> dict[str, Any]:
        body = self._whole([self._choice(part) for part in parts], usage)
        if self.num_prompt_logprobs is not None:
            body["prompt_logprobs"] = self._prompt_logprobs(parts[0])
        return body

    def _choice(self, part: ChoicePart) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": part.text, "refusal": None}
        if part.reasoning:
            message.update(_reasoning(part.reasoning))
        if part.reasoning or part.tool_calls:
            message["content"] = part.text or None
        if part.tool_calls:
            message["tool_calls"] = [call.as_dict() for call in part.tool_calls]
        return {
            "index": part.index,
            "message": message,
            "logprobs": self._logprobs(part) if self.wants_logprobs else None,
            "finish_reason": part.finish_reason,
            "stop_reason": part.stop_reason,
        }

    def _logprobs(self, part: ChoicePart) -> dict[str, Any]:
        return {"content": [chat_token(entry, self.token_text) for entry in part.logprobs], "refusal": None}


class CompletionWire(_Base):
    """``text_completion``."""

    def __init__(
        self,
        head: Head,
        token_text: TokenText,
        *,
        num_logprobs: int | None,
        include_usage: bool,
        num_prompt_logprobs: int | None = None,
    ) -> None:
        super().__init__(
            head, "text_completion", "text_completion", token_text, num_logprobs is not None, include_usage,
            num_prompt_logprobs,
        )  # fmt: skip
        self._num_logprobs = num_logprobs or 0

    def chunk(self, part: ChoicePart) -> bytes:
        if not part.text and part.finish_reason is None and not part.logprobs:
            return b""
        wanted = self.wants_logprobs and (part.logprobs or part.prompt_token_ids)
        logprobs = _json(self._logprobs(part)) if wanted else "null"
        return (
            f'{self._prefix}"choices":[{{"index":{part.index},"text":{quote(part.text)},"logprobs":{logprobs},'
            f'"finish_reason":{_finish(part)}}}{self._end(part)}'
        ).encode()

    def whole(self, parts: Sequence[ChoicePart], usage: Usage) -> dict[str, Any]:
        choices = [
            {
                "index": part.index,
                "text": part.text,
                "logprobs": self._logprobs(part) if self.wants_logprobs else None,
                "finish_reason": part.finish_reason,
                "stop_reason": part.stop_reason,
                **(
                    {}
                    if self.num_prompt_logprobs is None
                    else {"prompt_logprobs": self._prompt_logprobs(part)}
                ),
            }
            for part in parts
        ]
        return self._whole(choices, usage)

    def _logprobs(self, part: ChoicePart) -> dict[str, Any]:
        """OpenAI's columns; an echoed prompt's tokens come first, and the very first has nothing before it."""
        entries, first = list(part.logprobs), part.prompt_token_ids[:1]
        if first:
            entries = [*part.prompt_logprobs, *entries]
        tokens = [self.token_text(token_id) for token_id in first]
        tokens += [self.token_text(entry.token_id) for entry in entries]
        offsets = [part.text_offset]
        for token in tokens[:-1]:
            offsets.append(offsets[-1] + len(token))
        nothing = [None] * len(first)
        return {
            "tokens": tokens,
            "token_logprobs": nothing + [finite(entry.logprob) for entry in entries],
            "top_logprobs": nothing + [self._top(entry) for entry in entries],
            "text_offset": offsets[: len(tokens)],
        }

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        count = self._num_logprobs
        return {
            self.token_text(i): finite(p) for i, p in zip(entry.top_ids[:count], entry.top_logprobs[:count])
        }


def finite(logprob: float) -> float:
    """JSON has no infinity; a token that cannot be chosen gets OpenAI's floor."""
    return max(logprob, -9999.0)


def _chat_delta(part: ChoicePart) -> str:
    fields: list[str] = []
    if part.is_first:
        fields.append('"role":"assistant"')
    if part.text or part.is_first:
        fields.append(f'"content":{quote(part.text)}')
    if part.reasoning:
        fields += [f'"{name}":{quote(text)}' for name, text in _reasoning(part.reasoning).items()]
    if part.tool_calls:
        calls = [{"index": call.index, **call.as_dict()} for call in part.tool_calls]
        fields.append(f'"tool_calls":{_json(calls)}')
    return "{" + ",".join(fields) + "}"


def _finish(part: ChoicePart) -> str:
    if part.finish_reason is None:
        return "null"
    return f'{quote(part.finish_reason)},"stop_reason":{_json(part.stop_reason)}'


def _reasoning(text: str) -> dict[str, str]:
    """Under the name that vLLM has now, and the one that it had, which is DeepSeek's: clients read either."""
    return {"reasoning": text, "reasoning_content": text}


def chat_token(entry: TokenLogprobs, token_text: Callable[[int], str]) -> dict[str, Any]:
    """One output token as chat completions tell it."""
    top = [
        _token_entry(token_text(token_id), logprob)
        for token_id, logprob in zip(entry.top_ids, entry.top_logprobs)
    ]
    return {**_token_entry(token_text(entry.token_id), entry.logprob), "top_logprobs": top}


def _token_entry(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": finite(logprob), "bytes": list(text.encode("utf-8", "replace"))}


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
