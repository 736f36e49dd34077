"""What gateway and replica say to each other: one HTTP request, and its answer whole or in parts. Picklable; no Ray."""

from __future__ import annotations

from dataclasses import dataclass

Headers = tuple[tuple[str, str], ...]

REPEATABLE = frozenset(
    {
        "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/rerank", "/v1/score",
        "/rerank", "/score", "/tokenize", "/detokenize", "/v1/models",
    }
)  # fmt: skip
"""What a gateway forwards: any replica may answer, and asking a second one after the first was lost changes nothing."""


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """A request as it came, with its prompt's prefix for the router."""

    method: str
    path: str
    query: str
    headers: Headers
    body: bytes
    prefix: tuple[str, ...] = ()  # workbench.deploy.prefix.prefix_chain


@dataclass(frozen=True, slots=True)
class AnswerStart:
    """The first thing that a replica says. An event stream's bytes follow; of any other answer this is all."""

    status: int
    headers: Headers
    body: bytes = b""
    is_stream: bool = False
