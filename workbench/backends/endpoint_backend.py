"""EndpointBackend: a named endpoint's models as a Backend: what its kind can do is asked for, the rest is refused by name.

A parameter that its kind does not take is refused before anything is sent. Log-probabilities alone may be missing: where a kind
tells none, a completion has none.

Boundary: one endpoint. Local models beside it are `by_id`'s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from engine.embedding import Embedding, Relevance
from engine.llm import Score
from engine.pooling import PoolingParams
from engine.records import Completion
from engine.sampling_params import SamplingParams
from workbench.backends.endpoint_kinds import unsupported
from workbench.backends.endpoints import Endpoint, is_endpoint, parse_id
from workbench.backends.openai import OpenAIBackend
from workbench.backends.openai_answer import UNKNOWN_TOKEN
from workbench.backends.protocol import (
    DEFAULT_CONCURRENCY,
    BackendError,
    BackendUnsupportedError,
    Message,
    Prompt,
    as_prompts,
)
from workbench.backends.retries import Retries
from workbench.backends.window import in_window


class EndpointBackend(OpenAIBackend):
    """Asks `endpoint`; `model`: of its models, None its own or the first that it lists.

    Raises:
        EndpointKeyError: its key is not in this process's environment.
        BackendLostError: it had to be asked for its models, and does not answer.
    """

    def __init__(
        self, endpoint: Endpoint, model: str | None = None, *, retries: Retries | None = None
    ) -> None:
        self.endpoint = endpoint
        super().__init__(
            endpoint.base_url, None, model or endpoint.model, headers=endpoint.headers(), retries=retries
        )
        self.name = f"endpoint {endpoint.name}"

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        model: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        max_concurrency: int = DEFAULT_CONCURRENCY,
    ) -> list[Completion]:
        self._need("chat")
        if tools:
            self._need("tools")
        return super().chat(
            messages, self._fitting(params), model=self._of(model), tools=tools, max_concurrency=max_concurrency
        )  # fmt: skip

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        model: str | None = None,
        max_concurrency: int = DEFAULT_CONCURRENCY,
    ) -> list[Completion]:
        self._need("completions")
        return super().generate(
            prompts, self._fitting(params), model=self._of(model), max_concurrency=max_concurrency
        )

    def score(self, texts: Prompt | Sequence[Prompt], *, model: str | None = None) -> list[Score]:
        """By an echoed prompt. Token ids are unknown; their number is true."""
        self._need("score")
        name = self._of(model)

        def one(text: Prompt) -> Score:
            prompt = text if isinstance(text, str) else list(text)
            body = {"model": name, "prompt": prompt, "echo": True, "logprobs": 0, "max_tokens": 1}
            answer = self._post("/completions", body)
            told = answer["choices"][0]["logprobs"]["token_logprobs"]
            logprobs = tuple(float(p) for p in told[1 : len(told) - answer["usage"]["completion_tokens"]])
            total = math.fsum(logprobs)
            perplexity = math.exp(-total / len(logprobs)) if logprobs else math.nan
            return Score((UNKNOWN_TOKEN,) * (len(logprobs) + 1), logprobs, total, perplexity)

        return in_window(
            [partial(one, text) for text in as_prompts(texts)], DEFAULT_CONCURRENCY, self.hang_up
        )

    def embed(
        self,
        texts: Prompt | Sequence[Prompt],
        params: PoolingParams | None = None,
        *,
        model: str | None = None,
    ) -> list[Embedding]:
        self._need("embeddings", params)
        name = self._of(model)

        def one(text: Prompt) -> Embedding:  # a request each, so that each one's tokens are known
            import numpy as np

            answer = self._post(
                "/embeddings", {"model": name, "input": text if isinstance(text, str) else list(text)}
            )
            vector = np.asarray(answer["data"][0]["embedding"], np.float64)
            return Embedding(vector, int((answer.get("usage") or {}).get("prompt_tokens") or 0))

        return in_window(
            [partial(one, text) for text in as_prompts(texts)], DEFAULT_CONCURRENCY, self.hang_up
        )

    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        params: PoolingParams | None = None,
        *,
        model: str | None = None,
    ) -> list[Relevance]:
        """The tokens of each document are not told: 0."""
        self._need("rerank", params)
        body = {"model": self._of(model), "query": query, "documents": list(documents)}
        found = self._post("/rerank", body)["results"]
        ranked = [Relevance(int(each["index"]), float(each["relevance_score"]), 0) for each in found]
        return sorted(ranked, key=lambda each: -each.score)

    def load(self, ref: str, *, deterministic: bool = False) -> str:
        """The id to ask it by. What it computes with is its own affair: `deterministic` cannot be asked of it."""
        if deterministic:
            self._refuse(f"load {ref!r} deterministically")
        return self._of(ref) or ""

    # ── inside ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _of(self, model: str | None) -> str | None:
        """A model's own name, of an id or as it is."""
        name = parse_id(model).model if model is not None and is_endpoint(model) else model
        return name or self._model

    def _address(self, path: str, model: str | None) -> str:
        return self.endpoint.address(path, model)

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            return self._ask(lambda: self._client.post(self._address(path, body["model"]), json=body))
        except (LookupError, TypeError, ValueError) as error:
            raise BackendError(f"{self.name} answered {path} in another form ({error})") from error

    def _fitting(
        self, params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[SamplingParams] | SamplingParams:
        """The params as this kind takes them. Raises BackendUnsupportedError."""
        given = (
            [SamplingParams()]
            if params is None
            else [params]
            if isinstance(params, SamplingParams)
            else params
        )
        fitting = [fit(self.endpoint, each) for each in given]
        return fitting if isinstance(params, Sequence) else fitting[0]

    def _need(self, ability: str, params: PoolingParams | None = None) -> None:
        if not self.endpoint.abilities.can(ability):
            self._refuse(f"serve {ability}: {self.endpoint.abilities.title} has no such route")
        if params is not None and params != PoolingParams():
            self._refuse(f"take {params}")


def fit(endpoint: Endpoint, params: SamplingParams) -> SamplingParams:
    """What is sent of `params`. Raises BackendUnsupportedError, naming what this kind of endpoint does not take."""
    refused = unsupported(endpoint.kind, params)
    if refused:
        raise BackendUnsupportedError(
            f"endpoint {endpoint.name} ({endpoint.abilities.title}) does not take {', '.join(refused)}", value=refused,
            limit=sorted(endpoint.abilities.params), param=refused[0], remedy="Leave it at its default, or ask another endpoint.",
        )  # fmt: skip
    if not endpoint.abilities.can("logprobs"):
        params = params.with_(logprobs=None)
    return params if "seed" in endpoint.abilities.params else params.with_(seed=None)
