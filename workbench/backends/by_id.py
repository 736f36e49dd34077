"""Which backend answers for a model's id: of ``endpoint:NAME/MODEL`` that endpoint, of everything else this machine's engines.

`ByIdBackend` is what comparisons and notebooks use where either may be asked. Neither is opened before it is needed: two
endpoints are compared without a model in this machine's memory.

Boundary: choosing. It asks nobody itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engine.embedding import Embedding, Relevance
from engine.llm import Score
from engine.pooling import PoolingParams
from engine.records import Completion, EngineStats
from engine.sampling_params import SamplingParams
from engine.token_kl import TokenKL
from workbench.backends.endpoint_backend import EndpointBackend
from workbench.backends.endpoints import Endpoint, Endpoints, is_endpoint, parse_id
from workbench.backends.protocol import (
    DEFAULT_CONCURRENCY,
    Backend,
    BackendUnsupportedError,
    ClosesItself,
    Message,
    Prompt,
    Records,
)
from workbench.settings import Settings


def find_endpoint(model: str, settings: Settings) -> Endpoint:
    """The endpoint that an id names. Raises EndpointError, UnknownEndpointError, StoreError."""
    from workbench.store import open_store

    name = parse_id(model).endpoint
    with open_store(settings.home_dir) as store:
        return Endpoints(store).get(name)


def open_endpoint(model: str, settings: Settings) -> EndpointBackend:
    """A backend whose default is the model of that id. Raises as `find_endpoint` and EndpointBackend."""
    return EndpointBackend(find_endpoint(model, settings), parse_id(model).model)


class ByIdBackend(ClosesItself):
    """Local models and endpoints behind one Backend. `local` is called once, when a model of this machine is first asked for."""

    def __init__(self, settings: Settings, local: Callable[[], Backend]) -> None:
        self.name = "by id"
        self._settings = settings
        self._make_local = local
        self._lock = threading.Lock()
        self._local: Backend | None = None
        self._endpoints: dict[str, EndpointBackend] = {}

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        model: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        max_concurrency: int = DEFAULT_CONCURRENCY,
    ) -> list[Completion]:
        backend = self._of(model)
        return backend.chat(messages, params, model=model, tools=tools, max_concurrency=max_concurrency)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        model: str | None = None,
        max_concurrency: int = DEFAULT_CONCURRENCY,
    ) -> list[Completion]:
        return self._of(model).generate(prompts, params, model=model, max_concurrency=max_concurrency)

    def score(self, texts: Prompt | Sequence[Prompt], *, model: str | None = None) -> list[Score]:
        return self._of(model).score(texts, model=model)

    def embed(
        self, texts: Prompt | Sequence[Prompt], params: PoolingParams | None = None, *, model: str | None = None
    ) -> list[Embedding]:  # fmt: skip
        return self._of(model).embed(texts, params, model=model)

    def rerank(
        self, query: str, documents: Sequence[str], params: PoolingParams | None = None, *, model: str | None = None
    ) -> list[Relevance]:  # fmt: skip
        return self._of(model).rerank(query, documents, params, model=model)

    def token_kl(
        self, texts: Prompt | Sequence[Prompt], *, other: str, model: str | None = None
    ) -> list[TokenKL]:
        if is_endpoint(model) or is_endpoint(other):
            raise BackendUnsupportedError(
                "whole distributions cannot be compared with an endpoint's", value=[model, other], param="model",
                remedy="Compare two versions of this machine.",
            )  # fmt: skip
        return self._of(model).token_kl(texts, other=other, model=model)

    def models(self) -> list[str]:
        """Of this machine, once one of them was asked for."""
        return self._local.models() if self._local is not None else []

    def load(self, ref: str, *, deterministic: bool = False) -> str:
        """As the protocol says; of an endpoint only its id, since what it computes with is its own affair."""
        if is_endpoint(ref):
            self._of(ref)
            return ref
        return self._of(ref).load(ref, deterministic=deterministic)

    def unload(self, model: str) -> None:
        if not is_endpoint(model):
            self._of(model).unload(model)

    def stats(self, model: str | None = None) -> EngineStats:
        return self._of(model).stats(model)

    def records(self, model: str | None = None, since_ns: int | None = None) -> Records:
        return self._of(model).records(model, since_ns)

    def close(self) -> None:
        with self._lock:
            opened = [*self._endpoints.values(), *([self._local] if self._local is not None else [])]
            self._endpoints, self._local = {}, None
        for backend in opened:
            backend.close()

    def _of(self, model: str | None) -> Backend:
        with self._lock:
            if model is None or not is_endpoint(model):
                if self._local is None:
                    self._local = self._make_local()
                return self._local
            name = parse_id(model).endpoint
            if name not in self._endpoints:
                self._endpoints[name] = open_endpoint(model, self._settings)
            return self._endpoints[name]
