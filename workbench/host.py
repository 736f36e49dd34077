"""EngineHost: the one owner of the engines in this process: loads them off the loop, hands out their workers.

Pages, API and CLI ask it for a worker and never build an engine themselves. Loading happens in a background thread, so
the UI answers at once; until then `worker` raises NotReadyError with the progress. Importing this module imports no torch:
the loader thread does.

Boundary: lifecycle and lookup. It does not schedule, tokenize or render.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from workbench.errors import NotReadyError, UnknownModelError, WorkbenchError
from workbench.model_card import ModelCard, PromptChip, read_model_card
from workbench.settings import FAKE_MODEL

if TYPE_CHECKING:
    from engine.config import EngineConfig
    from engine.errors import EngineError
    from engine.worker import EngineWorker

__all__ = [
    "EngineHost",
    "HostPhase",
    "HostState",
    "ModelCard",
    "PromptChip",
    "fake_host",
    "fake_worker",
    "load_worker",
]

log = logging.getLogger(__name__)
Progress = Callable[[str, float], None]
FAKE_ANSWER = (
    "This answer comes from a runner without a model. Its scheduler, its KV blocks and its records are real: every letter "
    "is one token and one step, so that a page has something to show while you read."
)
OnFatal = Callable[[BaseException], None]
OnReady = Callable[[ModelCard, "EngineWorker"], None]


class HostPhase(str, Enum):
    IDLE = "idle"  # start() was not called
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"  # the load failed, or the engine died later; `error` says why
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class HostState:
    """How far the host is. `fraction` of the load is between 0 and 1; `error` is typed and has a remedy."""

    phase: HostPhase
    message: str = ""
    fraction: float = 0.0
    error: EngineError | WorkbenchError | None = None

    @property
    def ready(self) -> bool:
        return self.phase is HostPhase.READY


class WorkerFactory(Protocol):
    """Makes the worker of a configuration. Runs in the loader thread; the host starts what it returns."""

    def __call__(self, config: EngineConfig, *, progress: Progress, on_fatal: OnFatal) -> EngineWorker: ...


class EngineHost:
    """Holds the resident engine and tells how it is.

    `config.model` is a folder or a hub id. `factory` builds the worker (default: the real engine). `on_ready` sees each
    worker before it takes requests, in the loader thread. `on_fatal` is called, from the engine's thread, when the engine
    dies under load: the process should then exit for its supervisor.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        factory: WorkerFactory | None = None,
        on_ready: OnReady | None = None,
        on_fatal: OnFatal | None = None,
    ) -> None:
        self._config = config
        self._factory = factory or load_worker
        self._on_ready = on_ready
        self._on_fatal = on_fatal
        self._lock = threading.Lock()
        self._done = threading.Event()  # the load ended, well or not
        self._state = HostState(HostPhase.IDLE, "Not started")
        self._card: ModelCard | None = None
        self._worker: EngineWorker | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Load in the background. A second call does nothing."""
        with self._lock:
            if self._thread is not None or self._state.phase is HostPhase.CLOSED:
                return
            self._state = HostState(HostPhase.LOADING, "Starting")
            self._thread = threading.Thread(target=self._load, name="quire-loader", daemon=True)
            self._thread.start()

    def wait(self, timeout_s: float | None = None) -> HostState:
        """Block until the load ended or the time is over; the state then. Not for an event loop."""
        self._done.wait(timeout_s)
        return self.state()

    def state(self) -> HostState:
        """A snapshot; never waits for the engine."""
        return self._state

    def models(self) -> list[ModelCard]:
        """Cards of the models that this host serves or is loading."""
        return [self._card] if self._card is not None else []

    def worker(self, model_id: str | None = None) -> EngineWorker:
        """The worker of a model; of the default one for None.

        Raises:
            UnknownModelError: no model of that id is served here.
            NotReadyError: still loading, or failed, with progress or cause.
        """
        worker, card, state = self._worker, self._card, self._state
        if model_id is not None and card is not None and model_id != card.id:
            raise UnknownModelError(
                f"model {model_id!r} does not exist", value=model_id, limit=[card.id], param="model",
                remedy=f"Models here: {card.id}.",
            )  # fmt: skip
        if worker is None or not state.ready:
            raise self._not_ready(state)
        return worker

    def close(self) -> None:
        """Abort what runs, give the memory back. A load under way ends first, unseen. A second call does nothing."""
        with self._lock:
            if self._state.phase is HostPhase.CLOSED:
                return
            self._state = HostState(HostPhase.CLOSED, "Closed")
            worker, self._worker = self._worker, None
        self._done.set()
        if worker is not None:
            worker.close()

    def __enter__(self) -> EngineHost:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _load(self) -> None:
        try:
            self._report("Reading the model's files", 0.02)
            card = read_model_card(self._config.model)
            self._card = card
            config = replace(self._config, version_digest=self._config.version_digest or card.digest)
            worker = self._factory(config, progress=self._report, on_fatal=self._engine_died)
            self._card = replace(card, context=worker.config.max_model_len or card.context)
            if self._on_ready is not None:
                self._on_ready(self._card, worker)
            worker.start()
            self._publish(worker)
        except BaseException as error:  # thread boundary: every cause becomes a state that people can read
            log.warning("model load failed", exc_info=not _is_typed(error))
            self._fail(error, "The model could not be loaded")
        finally:
            self._done.set()

    def _publish(self, worker: EngineWorker) -> None:
        with self._lock:
            closed = self._state.phase is HostPhase.CLOSED
            if not closed:
                self._worker = worker
                self._state = HostState(HostPhase.READY, "Ready", 1.0)
        if closed:
            worker.close()

    def _report(self, message: str, fraction: float) -> None:
        with self._lock:
            if self._state.phase is HostPhase.LOADING:
                self._state = HostState(HostPhase.LOADING, message, min(max(fraction, 0.0), 1.0))

    def _fail(self, error: BaseException, what: str) -> None:
        with self._lock:
            if self._state.phase is not HostPhase.CLOSED:
                typed = _typed(error, what)
                self._state = HostState(HostPhase.FAILED, str(typed), self._state.fraction, typed)

    def _engine_died(self, error: BaseException) -> None:
        self._fail(error, "The engine stopped")
        if self._on_fatal is not None:
            self._on_fatal(error)

    def _not_ready(self, state: HostState) -> NotReadyError:
        if state.phase is HostPhase.LOADING:
            text, remedy = (
                f"the model is loading: {state.message} ({state.fraction:.0%})",
                "Try again in some seconds.",
            )
        elif state.phase is HostPhase.FAILED:
            text, remedy = (
                f"there is no model: {state.message}",
                "See the error, then restart with another model.",
            )
        else:
            text, remedy = f"the engine is {state.phase.value}", "Start it, or wait for the restart."
        return NotReadyError(text, value=state.phase.value, remedy=remedy, param="model")


def load_worker(config: EngineConfig, *, progress: Progress, on_fatal: OnFatal) -> EngineWorker:
    """Build the real engine on this device. Slow; imports torch. Raises ModelLoadError, ConfigError, OutOfMemoryError."""
    progress("Importing torch", 0.05)
    from engine.build import build_engine
    from engine.worker import EngineWorker

    return EngineWorker(build_engine(config, progress=progress), on_fatal=on_fatal)


def fake_worker(
    config: EngineConfig | None = None,
    *,
    progress: Progress | None = None,
    on_fatal: OnFatal | None = None,
    answer: str = FAKE_ANSWER,
    num_blocks: int = 512,
    max_model_len: int = 2048,
    delay_s: float = 0.005,
    fail_at: dict[int, Exception] | None = None,
) -> EngineWorker:
    """A worker, not started, over FakeRunner and FakeTokenizer: real scheduler, cache and records, no model.

    Itself a WorkerFactory: ``EngineHost(config, factory=fake_worker)``. Every request is answered with `answer`; a step
    takes `delay_s`; `fail_at` maps a step's number to the exception that it raises.
    """
    from engine.worker import EngineWorker
    from workbench.fake_engine import build_fake_engine

    engine = build_fake_engine(
        config,
        answer=answer,
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        delay_s=delay_s,
        fail_at=fail_at,
    )
    return EngineWorker(engine, on_fatal=on_fatal)


def fake_host() -> EngineHost:
    """A started and ready host over `fake_worker`, for tests and work on pages."""
    from engine.config import EngineConfig

    host = EngineHost(EngineConfig(model=FAKE_MODEL), factory=fake_worker)
    host.start()
    host.wait(10)
    return host


def _is_typed(error: BaseException) -> bool:
    from engine.errors import EngineError

    return isinstance(error, EngineError | WorkbenchError)


def _typed(error: BaseException, what: str) -> EngineError | WorkbenchError:
    from engine.errors import EngineError, ModelLoadError

    if isinstance(error, EngineError | WorkbenchError):
        return error
    wrapped = ModelLoadError(
        f"{what}: {type(error).__name__}: {error}", value=type(error).__name__,
        remedy="The log has the whole traceback; run `quire doctor` to check this machine.",
    )  # fmt: skip
    wrapped.__cause__ = error
    return wrapped
