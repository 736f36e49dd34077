"""What servers of other kinds answer: canned replies, and what was asked of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Reply:
    """One canned answer: JSON, text, or events that are sent one by one."""

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    events: list[dict[str, Any]] | None = None


Routes = dict[str, Any]  # "GET /path": a Reply, a JSON value, or a list of Replies given one after the other


@dataclass
class Shaped:
    url: str
    routes: Routes
    asked: list[tuple[str, dict[str, str], Any]] = field(
        default_factory=list
    )  # "METHOD /path", headers, body

    def bodies(self, route: str) -> list[Any]:
        return [body for name, _, body in self.asked if name == route]


def stream(*texts: str, model: str = "m") -> Reply:
    """A chat's answer as OpenAI streams it."""

    def chunk(choices: list[Any], **more: Any) -> dict[str, Any]:
        return {
            "id": "c1",
            "object": "chat.completion.chunk",
            "created": 1,
            "model": model,
            "choices": choices,
            **more,
        }

    told = [chunk([{"index": 0, "delta": {"content": text}, "finish_reason": None}]) for text in texts]
    end = chunk([{"index": 0, "delta": {}, "finish_reason": "stop"}])
    usage = {"prompt_tokens": 3, "completion_tokens": len(texts), "total_tokens": 3 + len(texts)}
    return Reply(events=[*told, end, chunk([], usage=usage)])
