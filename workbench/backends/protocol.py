"""Backend: what notebooks, evaluations, benchmarks and the CLI ask for completions, and the errors of all backends.

Boundary: the protocol. Who answers is in ``local``, ``app`` and ``openai``; which of them one gets, ``workbench.connect``'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self, cast

from engine.chat_messages import Message
from engine.embedding import Embedding, Relevance
from engine.errors import InvalidRequestError
from engine.llm import Score
from engine.pooling import PoolingParams
from engine.records import Completion, EngineStats
from engine.sampling_params import SamplingParams
from engine.token_kl import TokenKL
from workbench.backends.codec import Records, StepSummary
from workbench.errors import WorkbenchError

__all__ = [
    "Backend",
    "BackendError",
    "BackendLostError",
    "BackendUnsupportedError",
    "Message",
    "Prompt",
    "Records",
    "StepSummary",
]

Prompt = str | Sequence[int]
DEFAULT_CONCURRENCY = 16


class BackendError(WorkbenchError):
    """The backend refused, or failed while it answered."""

    code = "backend_error"


class BackendLostError(BackendError):
    """Whoever answered is gone, or went silent."""

    code = "backend_lost"


class BackendUnsupportedError(BackendError):
    """This kind of backend cannot do that."""

    code = "backend_unsupported"


class Backend(Protocol):
    """Answers requests; a context manager; safe to use from several threads.

    A request that fails while it runs comes back with finish reason ERROR and its `error`; the others are not lost.
    `model` is an id as ``models()`` and ``load()`` give them; None: the backend's default.
    """

    @property
    def name(self) -> str:
        """Who answers: "app http://127.0.0.1:8501", "local", "openai URL"."""
        ...

    def models(self) -> list[str]:
        """Ids of what is resident, the default first."""
        ...

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        model: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        max_concurrency: int = DEFAULT_CONCURRENCY,
    ) -> list[Completion]:
        """Answer one conversation or a list of them, in their order, at most `max_concurrency` at once."""
        ...

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        model: str | None = None,
        max_concurrency: int = DEFAULT_CONCURRENCY,
    ) -> list[Completion]:
        """Complete one prompt or many (texts or token ids)."""
        ...

    def score(self, texts: Prompt | Sequence[Prompt], *, model: str | None = None) -> list[Score]:
        """Log-probabilities of given texts, token by token."""
        ...

    def embed(
        self,
        texts: Prompt | Sequence[Prompt],
        params: PoolingParams | None = None,
        *,
        model: str | None = None,
    ) -> list[Embedding]:
        """One vector for each text."""
        ...

    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        params: PoolingParams | None = None,
        *,
        model: str | None = None,
    ) -> list[Relevance]:
        """Documents by how well they fit the query, the best first."""
        ...

    def token_kl(
        self, texts: Prompt | Sequence[Prompt], *, other: str, model: str | None = None
    ) -> list[TokenKL]:
        """How far the resident model `other` is from `model` at every token of given texts: exact KL divergence."""
        ...

    def load(self, ref: str, *, deterministic: bool = False) -> str:
        """Make a version resident (folder, hub id, NAME/3, NAME@alias); the id to give as `model`."""
        ...

    def unload(self, model: str) -> None:
        """Take one `load` back; the memory is given back when nobody else needs the version."""
        ...

    def stats(self, model: str | None = None) -> EngineStats: ...

    def records(self, model: str | None = None, since_ns: int | None = None) -> Records:
        """Finished requests and steps since a monotonic time; as far back as the engine keeps them."""
        ...

    def close(self) -> None:
        """Leave. Gives back what this backend itself holds; a second call does nothing."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class ClosesItself:
    """The context manager of a backend."""

    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# ── what is the same for all: one or many, checked before anything runs ─────────────────────────────────────────────────


def as_conversations(messages: Any) -> list[Sequence[Message]]:
    """A list of conversations, whether one or many were given. Raises InvalidRequestError."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise InvalidRequestError(
            "messages must be a list of {role, content} objects, or a list of such lists", value=messages,
            param="messages",
        )  # fmt: skip
    one = bool(messages) and isinstance(messages[0], Mapping)
    return cast("list[Sequence[Message]]", [messages] if one else list(messages))


def as_prompts(prompts: Any) -> list[Prompt]:
    """A list of prompts, whether one or many were given. Raises InvalidRequestError."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, bytes | Mapping) or not isinstance(prompts, Sequence):
        raise InvalidRequestError(
            f"a prompt must be text or a list of token ids, got {type(prompts).__name__}", value=prompts, param="prompt"
        )  # fmt: skip
    one = bool(prompts) and isinstance(prompts[0], int)
    return cast("list[Prompt]", [list(prompts)] if one else list(prompts))


def one_each(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    """As many params as there are prompts, each for one completion. Raises InvalidRequestError."""
    many = [params] if params is None or isinstance(params, SamplingParams) else params
    n = max((each.n for each in many if each is not None), default=1)
    if n > 1:
        raise InvalidRequestError(
            f"a backend gives one completion a prompt, n is {n}", value=n, limit=1, param="n",
            remedy="Give the prompt n times, with the params of params.each().",
        )  # fmt: skip
    best_of = next((each.best_of for each in many if each is not None and each.chooses), None)
    if best_of is not None:
        raise InvalidRequestError(
            f"a backend does not choose among completions, best_of is {best_of}", value=best_of, limit=1, param="best_of",
            remedy="Use LLM.generate, or /v1/completions.",
        )  # fmt: skip
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise InvalidRequestError(
            f"{len(params)} sampling params were given for {count} prompts", value=len(params), limit=count,
            remedy="Give one for all, or one for each prompt.", param="params",
        )  # fmt: skip
    return list(params)


def check_concurrency(max_concurrency: int) -> int:
    if not isinstance(max_concurrency, int) or isinstance(max_concurrency, bool) or max_concurrency < 1:
        raise InvalidRequestError(
            f"max_concurrency must be an integer of at least 1, got {max_concurrency!r}", value=max_concurrency,
            limit=1, param="max_concurrency",
        )  # fmt: skip
    return max_concurrency
