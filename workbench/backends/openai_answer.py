"""One streamed answer of the OpenAI protocol, gathered from its events into a Completion.

Token ids are not on that wire: they are `UNKNOWN_TOKEN`, so that counts are true and no comparison of ids is by accident equal to a
real one.

Boundary: events to values. Who sends them is ``workbench.backends.openai``'s and ``workbench.ui.endpoint_stream``'s.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from engine.plan import TokenLogprobs
from engine.records import Completion
from engine.request import FinishReason
from engine.sampling_params import SamplingParams

UNKNOWN_TOKEN = -1
_FINISH = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH, "tool_calls": FinishReason.STOP}


def events_of(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The events of a stream's lines, its end mark left out."""
    for line in lines:
        if line.startswith("data:") and not line.endswith("[DONE]"):
            yield json.loads(line[5:])


@dataclass(slots=True)
class StreamedAnswer:
    """One answer, gathered from its events. `sent` is the moment at which it was asked for."""

    params: SamplingParams
    id: str = ""
    texts: list[str] = field(default_factory=list)
    calls: dict[int, dict[str, str]] = field(default_factory=dict)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    sent: float = field(default_factory=time.monotonic)
    first: float | None = None
    last: float = 0.0
    pieces: int = 0

    def read(self, lines: Iterator[str]) -> None:
        for event in events_of(lines):
            self.take(event)
        self.last = self.last or time.monotonic()

    def take(self, event: dict[str, Any]) -> None:
        """What one event adds."""
        self.id = event.get("id") or self.id
        self.usage = event.get("usage") or self.usage
        if "error" in event:
            self.error = str(event["error"].get("message"))
        for choice in event.get("choices") or ():
            self._take(choice)

    def _take(self, choice: dict[str, Any]) -> None:
        delta = choice.get("delta") or {}
        text = delta.get("content") or choice.get("text") or ""
        for call in delta.get("tool_calls") or ():
            kept = self.calls.setdefault(call.get("index", 0), {"name": "", "arguments": ""})
            function = call.get("function") or {}
            kept["name"] += function.get("name") or ""
            kept["arguments"] += function.get("arguments") or ""
        if text or delta.get("tool_calls") or delta.get("reasoning") or delta.get("reasoning_content"):
            self.last = time.monotonic()
            self.first = self.first or self.last
            self.pieces += 1
        self.texts.append(text)
        self.logprobs += _logprobs(choice.get("logprobs"))
        if choice.get("finish_reason"):
            self.finish_reason = _FINISH.get(choice["finish_reason"], FinishReason.STOP)
            self.stop_reason = choice.get("stop_reason")

    def completion(self) -> Completion:
        num_output = int(self.usage.get("completion_tokens") or len(self.logprobs) or self.pieces)
        ttft = tpot = None
        if self.first is not None:
            ttft = (self.first - self.sent) * 1e3
            if num_output > 1:
                tpot = (self.last - self.first) * 1e3 / (num_output - 1)
        calls = [
            json.dumps(call, ensure_ascii=False, separators=(",", ":"))
            for _, call in sorted(self.calls.items())
        ]
        failed = self.error is not None or self.finish_reason is None
        return Completion(
            request_id=self.id,
            prompt_token_ids=(UNKNOWN_TOKEN,) * int(self.usage.get("prompt_tokens") or 0),
            token_ids=(UNKNOWN_TOKEN,) * num_output,
            text="".join(self.texts) + "\n".join(calls),
            finish_reason=FinishReason.ERROR if failed else self.finish_reason or FinishReason.ERROR,
            stop_reason=self.stop_reason,
            logprobs=tuple(self.logprobs),
            prompt_logprobs=(),
            num_cached_tokens=int((self.usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0),
            seed=self.params.seed or 0,
            ttft_ms=ttft,
            tpot_ms=tpot,
            e2e_ms=(time.monotonic() - self.sent) * 1e3,
            error=self.error or ("the stream ended without a finish reason" if failed else None),
        )


def _logprobs(block: dict[str, Any] | None) -> list[TokenLogprobs]:
    if not block:
        return []
    if block.get("content"):
        return [TokenLogprobs(UNKNOWN_TOKEN, float(entry["logprob"]), 0) for entry in block["content"]]
    return [
        TokenLogprobs(UNKNOWN_TOKEN, float(p), 0) for p in block.get("token_logprobs") or () if p is not None
    ]
