"""Loader: a slot of the table becomes a resident with a worker: an engine of its own, or an adapter over one of its base.

Boundary: building and publishing, in the thread that asks; the host's `loading` lock is held. Which slots there are, and for how long, is
``workbench.host``'s; the bytes are ``workbench.memory_budget``'s. Importing this imports no torch: building does.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import ConfigError, EngineError, ModelLoadError, UnsupportedAdapterError
from workbench import memory_budget
from workbench.adapter_worker import AdapterWorker
from workbench.errors import ModelAsleepError, NotReadyError, WorkbenchError
from workbench.memory_budget import Budget
from workbench.model_card import ModelCard, read_model_card
from workbench.model_source import ModelSource
from workbench.resident import HostPhase, HostState
from workbench.resident_table import ResidentTable, Slot
from workbench.worker_factory import OnFatal, Progress, WorkerFactory, is_on_cpu, load_worker

if TYPE_CHECKING:
    from engine.config import EngineConfig
    from engine.worker import EngineWorker

log = logging.getLogger(__name__)
OnWorker = Callable[[ModelCard, "EngineWorker"], None]


class Loader:
    """Over a host's table: `lock` guards it, `settle` lets go what has no reason to stay and is called under it.

    The other arguments are EngineHost's.
    """

    def __init__(
        self,
        config: EngineConfig,
        table: ResidentTable,
        *,
        lock: threading.Lock,
        stopping: threading.Event,
        settle: Callable[[], None],
        factory: WorkerFactory | None,
        budget: Budget | None,
        enable_lora: bool | None,
        on_ready: OnWorker | None,
        on_fatal: OnFatal | None,
    ) -> None:
        self._config = config
        self._table = table
        self._lock = lock
        self._stopping = stopping
        self._settle = settle
        self._factory = factory or load_worker
        self._is_real = factory is None or factory is load_worker
        self._budget = budget or (memory_budget.fit_beside if self._is_real else None)
        self._enable_lora = enable_lora
        self._on_ready = on_ready
        self._on_fatal = on_fatal
        self._adapter_numbers = count(1)

    @property
    def is_budgeted(self) -> bool:
        """Whether engines share a budget; those without a model do not."""
        return self._budget is not None

    def build(self, slot: Slot) -> None:
        """Load the model of a slot and publish its worker; an adapter over its base if it can be."""
        if slot.source.adapter is None:
            self._engine(slot, slot.source.path)
            return
        try:
            self._adapter(slot, slot.source.adapter)
        except Exception as error:
            reason = _why_not_over_base(error)
            if reason is None or slot.source.merge is None:
                raise
            log.info("%s is merged into its base: %s", slot.id, reason)
            slot.merged_because = reason
            self._engine(slot, str(slot.source.merge()))

    def _engine(self, slot: Slot, path: str, *, for_adapter: bool = False) -> None:
        """An engine of its own for the weights at `path`."""
        report = self._reporter(slot)
        report("Reading the model's files", 0.02)
        card = read_model_card(path)
        own = self._config.version_digest if path == self._config.model else ""
        slot.digest = own or slot.source.digest or card.digest
        slot.card = _named(card, slot)
        config = replace(
            slot.options.on(self._config), model=path, version_digest=slot.digest,
            enable_lora=self._takes_adapters(for_adapter),
        )  # fmt: skip
        try:
            worker = self._make_worker(slot, config)
        except EngineError as error:
            if error.param != "enable_lora" or for_adapter or self._enable_lora or self._config.enable_lora:
                raise
            worker = self._make_worker(slot, replace(config, enable_lora=False))  # nobody asked for it
        slot.card = replace(slot.card, context=worker.config.max_model_len or card.context)
        slot.ledger = worker.stats().memory
        self._open(slot, worker)

    def _make_worker(self, slot: Slot, config: EngineConfig) -> EngineWorker:
        report = self._reporter(slot)
        if self._budget is not None:
            report("Importing torch", 0.05)
            config = self._budget(config, self._table.ledgers())
            _check_context(slot, config)
        return self._factory(config, progress=report, on_fatal=lambda error: self._engine_died(slot, error))

    def _takes_adapters(self, for_adapter: bool) -> bool:
        if self._enable_lora is not None:
            return self._enable_lora
        return self._config.enable_lora or for_adapter or (self._is_real and is_on_cpu(self._config))

    def _adapter(self, slot: Slot, folder: str) -> None:
        """An adapter on an engine of its base, which is loaded first where none can take it.

        Raises:
            UnsupportedAdapterError: it cannot be served so.
        """
        if self._enable_lora is False:
            raise UnsupportedAdapterError(
                "engines take no adapters here", value=False, limit=True, param="enable_lora",
                remedy="Set QUIRE_ENABLE_LORA=true.",
            )  # fmt: skip
        source = slot.source
        slot.digest = source.digest
        self._reporter(slot)("Loading its base", 0.02)
        with self._lock:
            base = self._table.base_of(source, slot.options)
            if base is None:
                model = ModelSource(
                    source.path, Path(source.path).name, source.path, digest=source.base_digest
                )
                new_id = self._table.free_id(model, source.base_digest, slot.options.suffix, None)
                base = Slot(model, new_id, slot.options, HostState(HostPhase.LOADING, f"For {slot.id}"))
                self._table.add(base)
            base.holds += 1  # until the adapter is there
        try:
            if base.worker is None:
                self._base(base)
            worker, card = base.worker, base.card
            assert worker is not None
            assert card is not None
            lora = worker.add_lora(f"{slot.id}~{next(self._adapter_numbers)}", folder)
            slot.base, slot.adapter_bytes = base, lora.num_bytes
            slot.card = replace(_named(card, slot), path=folder)
            self._open(slot, AdapterWorker(worker, lora, slot.digest))
        finally:
            with self._lock:
                base.holds -= 1
                self._settle()

    def _base(self, base: Slot) -> None:
        try:
            self._engine(base, base.source.path, for_adapter=True)
        except BaseException:
            with self._lock:
                self._table.remove(base)
            raise

    def _open(self, slot: Slot, worker: EngineWorker) -> None:
        """Show a worker to `on_ready`, start and publish it."""
        assert slot.card is not None
        try:
            if self._on_ready is not None:
                self._on_ready(slot.card, worker)
            worker.start()
        except BaseException:
            worker.close()
            raise
        self._publish(slot, worker)

    def _publish(self, slot: Slot, worker: EngineWorker) -> None:
        with self._lock:
            closed = self._stopping.is_set()
            if not closed:
                slot.worker = worker
                slot.state = HostState(HostPhase.READY, "Ready", 1.0)
        if closed:
            worker.close()
            raise not_ready(HostState(HostPhase.CLOSED, "Closed"))

    def _reporter(self, slot: Slot) -> Progress:
        def report(message: str, fraction: float) -> None:
            with self._lock:
                if slot.state.phase is HostPhase.LOADING:
                    slot.state = HostState(HostPhase.LOADING, message, min(max(fraction, 0.0), 1.0))

        return report

    def fail(self, slot: Slot, error: BaseException, what: str) -> None:
        """Note why a slot has no engine; its adapters have none either."""
        with self._lock:
            if slot.state.phase is not HostPhase.CLOSED:
                typed = typed_error(error, what)
                slot.state = HostState(HostPhase.FAILED, str(typed), slot.state.fraction, typed)

    def _engine_died(self, slot: Slot, error: BaseException) -> None:
        self.fail(slot, error, "The engine stopped")
        if self._on_fatal is not None:
            self._on_fatal(error)


def _named(card: ModelCard, slot: Slot) -> ModelCard:
    """The folder's card under the name that requests use."""
    source = slot.source
    title = card.title if source.adapter is None else source.id
    if source.name:
        title = f"{source.name} v{source.version}"
    if slot.options.label:
        title += f" ({slot.options.label})"
    return replace(card, id=slot.id, title=title, digest=slot.digest)


def _check_context(slot: Slot, config: EngineConfig) -> None:
    """Refuse a context that was asked for of this model and is beyond it, or beyond what is left."""
    asked, most = slot.options.max_model_len, config.max_model_len
    if asked is not None and most is not None and most < asked:
        raise ConfigError(
            f"{slot.source.ref} cannot have a context of {asked} tokens here: {most} is the most", value=asked, limit=most,
            param="max_model_len", remedy=f"Ask for {most} or fewer, or unload another model for more memory.",
        )  # fmt: skip


def _why_not_over_base(error: Exception) -> str | None:
    """Why an adapter must be merged, where that would help; a file that is broken is broken merged as well."""
    refused = isinstance(error, UnsupportedAdapterError)
    no_slots = isinstance(error, EngineError) and error.param == "enable_lora"
    return str(getattr(error, "message", error)) if refused or no_slots else None


def not_ready(state: HostState, model_id: str = "") -> NotReadyError:
    """Why a model in this state answers nothing, and what to do."""
    if state.phase is HostPhase.SLEEPING:
        return ModelAsleepError(
            f"{model_id} sleeps ({state.message})", value=state.phase.value, limit=HostPhase.READY.value, param="model",
            remedy="Wake it first: `quire models wake`, the Versions page, or POST /quire/wake_up.",
        )  # fmt: skip
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


def typed_error(error: BaseException, what: str) -> EngineError | WorkbenchError:
    """`error`, or what nobody expected as a ModelLoadError with it as its cause."""
    if isinstance(error, EngineError | WorkbenchError):
        return error
    wrapped = ModelLoadError(
        f"{what}: {type(error).__name__}: {error}", value=type(error).__name__,
        remedy="The log has the whole traceback; run `quire doctor` to check this machine.",
    )  # fmt: skip
    wrapped.__cause__ = error
    return wrapped
