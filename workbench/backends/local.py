"""LocalBackend: engines of this process, for notebooks, scripts and commands where no app runs.

It takes the device of HOME_DIR (`DeviceLock`) before it loads anything and gives it back when it closes, so that two copies
of a model are never in memory by accident. Several versions can be resident at once; `EngineHost` holds them as in the app.

Boundary: this process's engines behind the Backend protocol. No HTTP; importing this imports no torch.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from engine.config import EngineConfig
from engine.embedding import Embedding, Relevance
from engine.errors import ConfigError, EngineDeadError, InvalidRequestError
from engine.llm import LLM, Score
from engine.pooling import PoolingParams
from engine.records import Completion, EngineStats
from engine.sampling_params import SamplingParams
from engine.token_kl import TokenKL
from workbench.backends.codec import step_summary
from workbench.backends.protocol import (
    DEFAULT_CONCURRENCY,
    ClosesItself,
    Message,
    Prompt,
    Records,
    as_conversations,
    as_prompts,
    check_concurrency,
    one_each,
)
from workbench.backends.window import in_window
from workbench.device_lock import DeviceLock
from workbench.errors import NotReadyError
from workbench.host import EngineHost, fake_worker
from workbench.settings import Settings

if TYPE_CHECKING:
    from engine.stream import RequestStream
    from engine.tokenizer import TokenizerLike
    from engine.worker import EngineWorker


class LocalBackend(ClosesItself):
    """Loads `model` (a ref; None: the settings' model) here and answers with it.

    `engine_settings`: fields of EngineConfig over those of `settings`.

    Raises:
        ConfigError: an unknown setting, or a value out of its range; nothing was locked or loaded.
        DeviceBusyError: another process owns the device.
        ModelLoadError, OutOfMemoryError, and what resolving the ref raises: the device was given back.
    """

    name = "local"

    def __init__(self, settings: Settings, *, model: str | None = None, **engine_settings: Any) -> None:
        config = _config(settings, model, engine_settings)
        settings.run_dir.mkdir(parents=True, exist_ok=True)
        self._lock = DeviceLock(settings.run_dir, settings.device_id).acquire()
        self._host: EngineHost | None = None
        self._closing = threading.Lock()
        try:
            self._host = _host(config, settings, engine_settings.get("enable_lora", settings.enable_lora))
            self._host.start()
            state = self._host.wait()
            if not state.ready:
                raise state.error or NotReadyError(state.message, param="model")
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
        worker = self._worker(model)
        tokenizer = _tokenizer(worker)
        many = as_conversations(messages)
        prompts: list[Prompt] = [tokenizer.apply_chat_template(chat, tools=tools) for chat in many]
        return _complete(worker, prompts, one_each(params, len(prompts)), max_concurrency)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        model: str | None = None,
        max_concurrency: int = DEFAULT_CONCURRENCY,
    ) -> list[Completion]:
        many = as_prompts(prompts)
        return _complete(self._worker(model), many, one_each(params, len(many)), max_concurrency)

    def score(self, texts: Prompt | Sequence[Prompt], *, model: str | None = None) -> list[Score]:
        return LLM.from_worker(self._worker(model)).score(texts, use_tqdm=False)

    def embed(
        self,
        texts: Prompt | Sequence[Prompt],
        params: PoolingParams | None = None,
        *,
        model: str | None = None,
    ) -> list[Embedding]:
        return LLM.from_worker(self._worker(model)).embed(as_prompts(texts), params, use_tqdm=False)

    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        params: PoolingParams | None = None,
        *,
        model: str | None = None,
    ) -> list[Relevance]:
        return LLM.from_worker(self._worker(model)).rerank(query, documents, params, use_tqdm=False)

    def token_kl(
        self, texts: Prompt | Sequence[Prompt], *, other: str, model: str | None = None
    ) -> list[TokenKL]:
        return LLM.from_worker(self._worker(model)).token_kl(LLM.from_worker(self._worker(other)), texts)

    # ── versions ────────────────────────────────────────────────────────────────────────────────────────────────────

    def models(self) -> list[str]:
        residents = [each for each in self._open_host().resident() if each.state.ready]
        return [each.id for each in sorted(residents, key=lambda each: not each.is_default)]

    def load(self, ref: str, *, deterministic: bool = False) -> str:
        return self._open_host().load(ref, deterministic=deterministic, hold=True).id

    def unload(self, model: str) -> None:
        self._open_host().release(model)

    # ── records ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def stats(self, model: str | None = None) -> EngineStats:
        return self._worker(model).stats()

    def records(self, model: str | None = None, since_ns: int | None = None) -> Records:
        worker = self._worker(model)
        log = worker.records
        requests = [each for each in log.requests(since_ns) if each.lora == worker.lora]
        return Records(requests, [step_summary(step) for step in log.steps(since_ns)])

    def close(self) -> None:
        """End the engines, give their memory and the device back. A second call does nothing."""
        with self._closing:
            host, self._host = self._host, None
            try:
                if host is not None:
                    host.close()
            finally:
                self._lock.release()

    def _open_host(self) -> EngineHost:
        if self._host is None:
            raise EngineDeadError("this backend is closed", remedy="Connect again.")
        return self._host

    def _worker(self, model: str | None) -> EngineWorker:
        return self._open_host().worker(model)


def _complete(
    worker: EngineWorker,
    prompts: Sequence[Prompt],
    params: Sequence[SamplingParams],
    max_concurrency: int,
) -> list[Completion]:
    running: set[RequestStream] = set()
    ended = threading.Event()

    def call(prompt: Prompt, each: SamplingParams) -> Completion:
        stream = worker.submit(prompt, each)
        running.add(stream)
        if ended.is_set():
            stream.abort()
        try:
            return stream.result()
        finally:
            running.discard(stream)

    def abort() -> None:
        ended.set()
        for stream in list(running):
            stream.abort()

    calls = [partial(call, prompt, each) for prompt, each in zip(prompts, params, strict=True)]
    return in_window(calls, check_concurrency(max_concurrency), abort)


def _config(settings: Settings, model: str | None, engine_settings: dict[str, Any]) -> EngineConfig:
    known = {field.name for field in fields(EngineConfig)} - {"model"}
    for name in engine_settings:
        if name not in known:
            raise ConfigError(
                f"unknown engine setting {name!r}", value=name, limit=sorted(known), param=name,
                remedy="See engine.EngineConfig for the settings that exist.",
            )  # fmt: skip
    config = replace(settings.engine_config(), **engine_settings)
    return replace(config, model=model) if model is not None else config


def _host(config: EngineConfig, settings: Settings, enable_lora: bool | None) -> EngineHost:
    from workbench.versions import resolve

    return EngineHost(
        config,
        factory=fake_worker if settings.fake else None,
        resolver=lambda ref: resolve(ref, settings, merged=False),
        enable_lora=enable_lora,
    )


def _tokenizer(worker: EngineWorker) -> TokenizerLike:
    if worker.tokenizer is None:
        raise InvalidRequestError(
            "this model has no tokenizer", remedy="Use token ids with generate().", param="messages"
        )
    return worker.tokenizer
