"""AppBackend: the running app of this HOME_DIR, over loopback: its engines, its memory, its records.

Uses the internal routes, because completions carry token ids, all log-probabilities and engine times there; each conversation is
a request of its own, so that the app's log and metrics see what a user's request would look like.

Boundary: HTTP. Shapes are ``workbench.backends.codec``'s; the routes ``workbench.api.internal``'s.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import httpx

from engine.embedding import Embedding, Relevance
from engine.errors import EngineError, QueueFullError
from engine.llm import Score
from engine.pooling import PoolingParams
from engine.records import Completion, EngineStats
from engine.sampling_params import SamplingParams
from engine.token_kl import TokenKL
from workbench.backends import codec
from workbench.backends.app_client import AppClient
from workbench.backends.protocol import (
    DEFAULT_CONCURRENCY,
    Message,
    Prompt,
    Records,
    as_conversations,
    as_prompts,
    check_concurrency,
    one_each,
)
from workbench.backends.window import in_window
from workbench.errors import NotReadyError, ServerUnreachableError, UnknownModelError, WorkbenchError
from workbench.run_state import RunningApp

READY_TIMEOUT_S = 180.0
QUEUE_PATIENCE_S = 600.0  # how long work is sent again to an app whose queue is full
_MAX_PAUSE_S = 5.0  # room may come before the app expects it
_LOADING = ("idle", "loading")


class AppBackend(AppClient):
    """Attached to a running app.

    Raises:
        ServerUnreachableError: nothing answers there.
        NotReadyError: its model could not be loaded, or not within `ready_timeout_s`.
    """

    def __init__(
        self,
        app: RunningApp,
        *,
        model: str | None = None,
        deterministic: bool = False,
        ready_timeout_s: float = READY_TIMEOUT_S,
    ) -> None:
        super().__init__(app)
        self._default: str | None = None
        self._held: list[str] = []  # what this backend has loaded there and not given back
        self._lock = threading.Lock()
        self._hung_up = threading.Event()  # a new one after each hang-up
        try:
            self._wait_ready(ready_timeout_s)
            if model is not None or deterministic:
                self._default = self.load(model or self._default_ref(), deterministic=deterministic)
        except BaseException:
            self.close()
            raise

    # ── completions ─────────────────────────────────────────────────────────────────────────────────────────────────

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        model: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        max_concurrency: int = DEFAULT_CONCURRENCY,
    ) -> list[Completion]:
        many = as_conversations(messages)
        plain_tools = [dict(tool) for tool in tools] if tools else None
        bodies = [
            {
                "messages": [[dict(message) for message in chat]],
                "params": [codec.params_to_json(each)],
                "tools": plain_tools,
            }
            for chat, each in zip(many, one_each(params, len(many)), strict=True)
        ]
        return self._complete("/quire/chat", bodies, model, max_concurrency)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        model: str | None = None,
        max_concurrency: int = DEFAULT_CONCURRENCY,
    ) -> list[Completion]:
        many = as_prompts(prompts)
        bodies = [
            {
                "prompts": [prompt if isinstance(prompt, str) else list(prompt)],
                "params": [codec.params_to_json(each)],
            }
            for prompt, each in zip(many, one_each(params, len(many)), strict=True)
        ]
        return self._complete("/quire/generate", bodies, model, max_concurrency)

    def score(self, texts: Prompt | Sequence[Prompt], *, model: str | None = None) -> list[Score]:
        many = [text if isinstance(text, str) else list(text) for text in as_prompts(texts)]
        answer = self._insist("/quire/score", {"model": model or self._default, "texts": many})
        return [codec.score_from_json(score) for score in answer["scores"]]

    def embed(
        self,
        texts: Prompt | Sequence[Prompt],
        params: PoolingParams | None = None,
        *,
        model: str | None = None,
    ) -> list[Embedding]:
        many = [text if isinstance(text, str) else list(text) for text in as_prompts(texts)]
        answer = self._insist("/quire/embed", self._pooled(model, params, texts=many))
        return [codec.embedding_from_json(each) for each in answer["embeddings"]]

    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        params: PoolingParams | None = None,
        *,
        model: str | None = None,
    ) -> list[Relevance]:
        body = self._pooled(model, params, query=query, documents=list(documents))
        return [codec.relevance_from_json(each) for each in self._insist("/quire/rerank", body)["relevances"]]

    def token_kl(
        self, texts: Prompt | Sequence[Prompt], *, other: str, model: str | None = None
    ) -> list[TokenKL]:
        many = [text if isinstance(text, str) else list(text) for text in as_prompts(texts)]
        body = {"model": model or self._default, "other": other, "texts": many}
        return [
            codec.token_kl_from_json(each) for each in self._insist("/quire/token_kl", body)["divergences"]
        ]

    def _pooled(self, model: str | None, params: PoolingParams | None, **content: Any) -> dict[str, Any]:
        return {"model": model or self._default, "params": asdict(params or PoolingParams()), **content}

    # ── versions ────────────────────────────────────────────────────────────────────────────────────────────────────

    def models(self) -> list[str]:
        residents = self._get("/quire/residents")["residents"]
        first = self._default
        ordered = sorted(residents, key=lambda each: (each["id"] != first, not each["is_default"]))
        return [each["id"] for each in ordered]

    def load(self, ref: str, *, deterministic: bool = False) -> str:
        """As the protocol says; it stays until `unload` or `close`, and longer where others need it too."""
        answer = self._post("/quire/load", {"ref": ref, "deterministic": deterministic})
        with self._lock:
            self._held.append(str(answer["id"]))
        return str(answer["id"])

    def unload(self, model: str) -> None:
        with self._lock:
            if model not in self._held:
                raise UnknownModelError(
                    f"{model!r} was not loaded by this backend", value=model, limit=list(self._held), param="model",
                    remedy="Unload what load() has returned; others may need the rest.",
                )  # fmt: skip
            self._held.remove(model)
        self._post("/quire/unload", {"id": model})

    def _default_ref(self) -> str:
        residents = self._get("/quire/residents")["residents"]
        return next(str(each["ref"]) for each in residents if each["is_default"])

    # ── records ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def stats(self, model: str | None = None) -> EngineStats:
        return codec.stats_from_json(self._get("/quire/stats", model=model or self._default)["stats"])

    def records(self, model: str | None = None, since_ns: int | None = None) -> Records:
        return codec.records_from_json(
            self._get("/quire/records", model=model or self._default, since_ns=since_ns)
        )

    def close(self) -> None:
        """Let go of the app, and of what was loaded in it for this backend."""
        with self._lock:
            held, self._held = self._held, []
        for model in held:
            with contextlib.suppress(EngineError, WorkbenchError):  # it may be gone, and all models with it
                self._post("/quire/unload", {"id": model})
        super().close()

    def hang_up(self) -> None:
        super().hang_up()
        former, self._hung_up = self._hung_up, threading.Event()
        former.set()

    # ── wire ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _complete(
        self, path: str, bodies: list[dict[str, Any]], model: str | None, max_concurrency: int
    ) -> list[Completion]:
        calls = [partial(self._insist, path, {"model": model or self._default, **body}) for body in bodies]
        answers = in_window(calls, check_concurrency(max_concurrency), self.hang_up)
        return [codec.completion_from_json(answer["completions"][0]) for answer in answers]

    def _insist(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Post work, and again when the app says so while its queue is full. Raises QueueFullError after QUEUE_PATIENCE_S."""
        hung_up, deadline = self._hung_up, time.monotonic() + QUEUE_PATIENCE_S
        while True:
            try:
                return self._post(path, body)
            except QueueFullError as error:
                pause_s = min(error.retry_after_s, _MAX_PAUSE_S) * random.uniform(0.7, 1.3)  # not all at once
                if time.monotonic() + pause_s > deadline or hung_up.wait(pause_s):
                    raise

    def _wait_ready(self, timeout_s: float) -> None:
        """An app that has just been started loads its model first."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                response = self._client.get("/readyz")
                facts = response.json()
            except (httpx.HTTPError, ValueError) as error:
                raise ServerUnreachableError(
                    f"no app answers at {self.url} ({type(error).__name__}: {error})", value=self.url,
                    remedy="Start one with `quire up`, or remove run/app.json of this HOME_DIR if there is none.",
                ) from error  # fmt: skip
            if response.status_code == 200 or facts.get("phase") == "sleeping":  # others may answer
                return
            if facts.get("phase") not in _LOADING or time.monotonic() > deadline:
                raise NotReadyError(
                    f"the app at {self.url} has no model: {facts.get('message')}", value=facts.get("phase"),
                    limit=timeout_s, remedy="See its Overview page or log.", param="model",
                )  # fmt: skip
            time.sleep(0.2)
