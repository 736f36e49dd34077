"""EngineHost: the one owner of the engines in this process: loads them off the loop, hands out their workers.

Pages, API and CLI ask it for a worker and never build an engine themselves. The default model loads in a background thread,
so the UI answers at once; until then `worker` raises NotReadyError with the progress. Further models become resident with
`load`. A model stays while there is a reason: it is the default, it was asked for, a job holds it, or a followed alias names
it. Without one it drains: new requests do not reach it, running ones end on it, then it closes and gives its memory back.

An adapter is served over a resident engine of its base where that engine takes adapters, else merged into weights of its own;
either way it is a resident with a worker, and requests name it alike. A model may sleep: see ``workbench.sleeping``.

Boundary: lifecycle and lookup. It does not schedule, tokenize or render, and reads no registry itself (a resolver and
``workbench.alias_watcher`` do). Importing this imports no torch: the loading thread does.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.access.audit import Audit, audited
from workbench.draining import give_memory_back, wait_until_idle
from workbench.errors import ServerStoppingError, UnknownModelError, WorkbenchError
from workbench.load_options import PLAIN, LoadOptions
from workbench.loading import Loader, OnWorker, not_ready, typed_error
from workbench.memory_budget import Budget
from workbench.model_card import ModelCard, PromptChip, read_model_card
from workbench.model_source import ModelSource, Resolver, alias_of, plain, resolve_source
from workbench.resident import Followed, HostPhase, HostState, Resident
from workbench.resident_table import ResidentTable, Slot, Wish
from workbench.settings import FAKE_MODEL
from workbench.sleeping import Sleeper
from workbench.traffic import Split
from workbench.worker_factory import (
    FAKE_ANSWER,
    OnFatal,
    Progress,
    WorkerFactory,
    fake_worker,
    load_worker,
)

if TYPE_CHECKING:
    from engine.config import EngineConfig
    from engine.worker import EngineWorker

__all__ = [
    "FAKE_ANSWER",
    "EngineHost",
    "Followed",
    "HostPhase",
    "HostState",
    "ModelCard",
    "OnFatal",
    "Progress",
    "PromptChip",
    "Resident",
    "ResidentInUseError",
    "WorkerFactory",
    "fake_host",
    "fake_worker",
    "load_worker",
]

log = logging.getLogger(__name__)


class ResidentInUseError(WorkbenchError):
    """The model cannot be unloaded: something needs it."""

    code = "model_in_use"


_STOP_POLL_S = 0.02


class EngineHost:
    """Holds the resident engines and tells how they are.

    `config.model` is the default model: a folder, a hub id, or a registered version where there is a `resolver`. `factory`
    builds workers (default: the real engine), `budget` decides their memory (default: ``memory_budget.fit_beside`` for the
    real engine). `enable_lora`: whether adapters are served over engines of their bases; None: wherever that costs nothing
    until one comes, which is every engine on a CPU, and on a GPU one that is loaded for an adapter; False: they are merged.
    `on_ready` sees each worker before it takes requests, in the loading thread; `on_closed` sees it after it was closed.
    `on_fatal` is called, from the engine's thread, when an engine dies under load: the process should then exit for its
    supervisor. `audit`: where it is written down who loads, unloads and puts to sleep.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        factory: WorkerFactory | None = None,
        resolver: Resolver | None = None,
        budget: Budget | None = None,
        enable_lora: bool | None = None,
        splits: Sequence[Split] = (),
        on_ready: OnWorker | None = None,
        on_closed: OnWorker | None = None,
        on_fatal: OnFatal | None = None,
        audit: Audit | None = None,
    ) -> None:
        self._config = config
        self.audit = audit or Audit()
        self._resolver = resolver
        self.splits = {split.name: split for split in splits}
        self._on_closed = on_closed
        self._lock = threading.Lock()
        self._loading = threading.Lock()  # one load at a time; never taken while _lock is held
        self._done = threading.Event()  # the first load ended, well or not
        self._stopping = threading.Event()
        self.is_stopping = False  # no more requests; those that run may end
        self.is_draining = False  # the API takes no more requests until it is resumed (workbench.api.load)
        self._table = ResidentTable()
        self._without_default = HostState(HostPhase.IDLE, "Not started")
        self._thread: threading.Thread | None = None
        self._loader = Loader(
            config, self._table, lock=self._lock, stopping=self._stopping, settle=self._settle, factory=factory,
            budget=budget, enable_lora=enable_lora, on_ready=on_ready, on_fatal=on_fatal,
        )  # fmt: skip
        self._sleeper = Sleeper(
            self._table, lock=self._lock, loading=self._loading, stopping=self._stopping,
            is_budgeted=self._loader.is_budgeted,
        )  # fmt: skip

    # ── the default model ───────────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        """Load the default model in the background. A second call does nothing."""
        with self._lock:
            if self._thread is not None or self._stopping.is_set():
                return
            source = ModelSource(self._config.model, self._config.model, self._config.model)
            loading = HostState(HostPhase.LOADING, "Starting")
            slot = Slot(source, source.id, PLAIN, loading)
            self._table.add(slot)
            self._table.default = slot
            self._thread = threading.Thread(
                target=self._load_default, args=(slot,), name="quire-loader", daemon=True
            )
            self._thread.start()

    def wait(self, timeout_s: float | None = None) -> HostState:
        """Block until the first load ended or the time is over; the state then. Not for an event loop."""
        self._done.wait(timeout_s)
        return self.state()

    def state(self) -> HostState:
        """How the default model is: a snapshot that never waits for the engine."""
        default = self._table.default
        return default.now if default is not None else self._without_default

    def models(self) -> list[ModelCard]:
        """Cards of the models that this host serves, asleep or not, the default one first, even while it loads."""
        default = self._table.default
        shown = [slot for slot in self._table.in_order() if slot.now.loaded or slot is default]
        return [slot.card for slot in shown if slot.card is not None]

    # ── lookup ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def resident(self) -> list[Resident]:
        """The models that requests can name, those that are loading included; the default one first."""
        return [self._table.describe(slot) for slot in self._table.in_order()]

    def draining(self) -> list[Resident]:
        """The models that take no new requests and close when their running ones have ended."""
        return [self._table.describe(slot) for slot in self._table.draining]

    def worker(self, model_id: str | None = None, user: str | None = None) -> EngineWorker:
        """The worker of a resident model, by id, NAME@alias, NAME/version or ``models:/…``; the default's for None.

        Of an adapter it is an AdapterWorker, whose requests carry it. Of a name whose traffic is split, `user` always gets the
        same while the same are loaded, and nobody any of them.

        Raises:
            UnknownModelError: no model of that name is served here.
            ModelAsleepError: it sleeps.
            NotReadyError: still loading, or failed, with progress or cause.
            ServerStoppingError: `stop_serving` was called.
        """
        if self.is_stopping:
            raise ServerStoppingError(
                "the server is stopping and takes no more requests",
                remedy="Send it to another server, or again when it has restarted.",
            )
        slot = self._slot(model_id, user)
        worker, state = slot.worker, slot.now
        if worker is None or not state.ready:
            raise not_ready(state, slot.id)
        slot.used_at = time.monotonic()
        return worker

    def find(self, model_id: str | None = None) -> Resident:
        """The resident that `worker` would take, though it may still be loading. Raises as `worker` does."""
        return self._table.describe(self._slot(model_id))

    def followed(self) -> list[Followed]:
        """The aliases that this host follows, and which versions serve them."""
        return self._table.followed()

    def known_aliases(self) -> dict[str, int | None]:
        """Every ``NAME@alias`` that leads to a resident model, or should, and the version that serves it."""
        known: dict[str, int | None] = {ref: slot.source.version for ref, slot in self._table.aliases.items()}
        known.update({each.ref: each.serving_version for each in self.followed()})
        return known

    # ── loading and unloading ───────────────────────────────────────────────────────────────────────────────────────

    @audited("load model")
    def load(
        self, ref: str, *, deterministic: bool = False, options: LoadOptions = PLAIN, as_default: bool = False,
        hold: bool = False,
    ) -> Resident:  # fmt: skip
        """Make a model resident; when it is there already, only note the new reason. Blocks: not for an event loop.

        `ref`: a folder, a hub id, ``NAME/3``, ``NAME@alias``, ``models:/…``. A plain ``NAME@alias`` is followed from now
        on. One that sleeps wakes up. `options`: what its engine has its own way; the same files with other options are another
        resident. `as_default`: it answers requests without a model from now on, and the former default drains. `hold`: it stays
        until `release` (for jobs), else until `unload`.

        Raises:
            UnknownModelError, ModelLoadError, ConfigError: it cannot be loaded; what was resident stays as it was.
            OutOfMemoryError: it does not fit beside the others: bytes and remedy are named.
            NotReadyError: the host is closed.
        """
        alias = alias_of(ref)
        options = replace(options, deterministic=deterministic or options.deterministic).beside(self._config)
        follow = alias is not None and not hold and options == PLAIN
        wish = Wish(
            pinned=not (hold or as_default or follow),
            hold=hold,
            as_default=as_default,
            alias="@".join(alias) if alias else None,
            follow=follow,
        )
        return self._load(ref, wish, options)

    @audited("unload model")
    def unload(self, model_id: str) -> None:
        """Let a model go, whoever asked for it: new requests do not reach it, running ones end on it. Does not wait.

        A followed alias that leads to it is not followed any more.

        Raises:
            UnknownModelError: it is not resident.
            ResidentInUseError: it is the default model, or its engine serves adapters.
        """
        with self._lock:
            slot = self._slot(model_id)
            if slot is self._table.default:
                raise ResidentInUseError(
                    f"{slot.id} is the default model", value=slot.id, param="id",
                    remedy="Load another one as the default first.",
                )  # fmt: skip
            adapters = [each.id for each in self._table.carries(slot)]
            if adapters:
                raise ResidentInUseError(
                    f"{slot.id} serves {', '.join(adapters)}", value=slot.id, limit=adapters, param="id",
                    remedy="Unload them first.",
                )  # fmt: skip
            self._retire(self._table.drop_reasons(slot))

    def release(self, model_id: str) -> None:
        """Take back one `load(hold=True)`. The model goes when nobody else needs it. Raises UnknownModelError."""
        with self._lock:
            slot = self._slot(model_id)
            slot.holds = max(0, slot.holds - 1)
            self._settle()

    def release_idle(self, after_s: float) -> None:
        """Drop the holds of models that nobody has used for so long: whoever held them was killed."""
        oldest = time.monotonic() - after_s
        with self._lock:
            for slot in self._table.slots:
                busy = slot.worker is not None and slot.worker.num_live > 0
                if slot.holds and slot.used_at < oldest and not busy:
                    log.info("nobody has used %s for %.0f s: its holds are dropped", slot.id, after_s)
                    slot.holds = 0
            self._settle()

    @audited("load adapter")
    def load_adapter(self, name: str, folder: str, *, load_inplace: bool = False) -> Resident:
        """Serve a PEFT folder over a resident engine of its base, under a name that requests give. Blocks.

        Its base is the resident with the digest that the adapter names, else the default model, whose shapes decide. It
        stays until `unload`. `load_inplace`: another adapter of that name is replaced; what runs on it ends on it.

        Raises:
            ResidentInUseError: the name is in use.
            AdapterError, WrongBaseError, ModelLoadError: it cannot be served; nothing has changed.
            NotReadyError: the base is not there yet, or the host is closed.
        """
        from workbench.versions.adapter import read_adapter
        from workbench.versions.merge import check_base, merged_digest

        with self._loading:
            if self._stopping.is_set():
                raise not_ready(self.state())
            adapter = read_adapter(Path(folder))
            default = self._slot(None)
            bases = [
                slot for slot in self._table.slots if slot.digest == adapter.base_digest and not slot.base
            ]
            base = (bases or [default.base or default])[0]
            if not base.state.loaded:
                raise not_ready(base.state, base.id)
            check_base(adapter, base.digest)
            former = next((slot for slot in self._table.slots if slot.id == name), None)
            may_replace = load_inplace and former is not None and former.base and not former.source.name
            if (former is not None and not may_replace) or self._table.lookup(name) is not former:
                raise ResidentInUseError(
                    f"the adapter {name!r} has already been loaded" if former and former.base else f"{name!r} names a model",
                    value=name, param="lora_name", remedy="Choose another name, or replace an adapter with load_inplace.",
                )  # fmt: skip
            digest = merged_digest(base.digest, adapter.digest)
            source = ModelSource(
                folder, name, base.source.path, digest=digest, adapter=folder, base_digest=base.digest
            )
            slot = Slot(source, name, base.options, HostState(HostPhase.LOADING, "Starting"))
            return self._bring(slot, Wish(pinned=True), former)

    # ── sleep ───────────────────────────────────────────────────────────────────────────────────────────────────────

    @audited("put model to sleep")
    def sleep(self, model_id: str, level: int = 1) -> Resident:
        """Have a model give its device memory back until `wake`; its running requests end first. Blocks.

        Level 1 keeps its weights in host memory, level 2 loads them again. Adapters sleep with their base. The models' ids
        and aliases stay; requests to them get ModelAsleepError.

        Raises:
            UnknownModelError, NotReadyError: it is not here, or not ready.
            ResidentInUseError: it is an adapter: its base is what can sleep.
            ConfigError: no such level, or none of this model's.
        """
        slot = self._engine_slot(model_id)
        if not slot.state.loaded:
            raise not_ready(slot.state, slot.id)
        self._sleeper.sleep(slot, level)
        return self._table.describe(slot)

    @audited("wake model")
    def wake(self, model_id: str) -> Resident:
        """Have a model take requests again; one that is awake stays so. Blocks.

        Raises:
            UnknownModelError, NotReadyError, ResidentInUseError: as `sleep`.
            OutOfMemoryError, ModelLoadError: it sleeps on.
        """
        slot = self._engine_slot(model_id)
        with self._loading:
            if not slot.state.loaded:
                raise not_ready(slot.state, slot.id)
            self._sleeper.wake(slot)
        return self._table.describe(slot)

    # ── followed aliases: the alias watcher's side ──────────────────────────────────────────────────────────────────

    def follow(self, ref: str) -> None:
        """Follow ``NAME@alias`` from now on; it is served once `serve` was called for it."""
        with self._lock:
            self._table.follow(ref)

    def note(self, ref: str, registry_version: int | None, error: str | None = None) -> None:
        """What the registry says of an alias. One that is not followed and has moved leads nowhere any more."""
        with self._lock:
            self._table.note(ref, registry_version, error)

    def serve(self, ref: str, version: int) -> Resident:
        """Load `version` of a followed alias and send the alias's new requests to it; the former one drains.

        A model that sleeps sleeps on. Raises: as `load`; the former version then goes on serving.
        """
        found = alias_of(ref)
        assert found is not None, f"{ref} is no alias"
        wish = Wish(alias=ref, follow=True)
        return self._load(f"{found[0]}/{version}", wish, PLAIN, wakes=False)

    # ── life ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def stop_serving(self, grace_s: float, hurry: threading.Event) -> None:
        """Take no more requests, and return when those that run have ended: by themselves, or after `grace_s` by an abort that
        tells why. `hurry`: set by whoever does not want to wait any longer.
        """
        self.is_stopping = True
        deadline = time.monotonic() + grace_s
        while self._num_live() and time.monotonic() < deadline and not hurry.wait(_STOP_POLL_S):
            pass
        for slot in self._table.everyone():
            if slot.worker is not None:
                slot.worker.abort_all("the server is stopping")

    def _num_live(self) -> int:
        workers = [slot.worker for slot in self._table.everyone() if slot.base is None]
        return sum(worker.num_live for worker in workers if worker is not None)

    def close(self) -> None:
        """Abort what runs, give the memory back. A load under way ends first, unseen. A second call does nothing."""
        with self._lock:
            if self._stopping.is_set():
                return
            self._stopping.set()
            self._without_default = HostState(HostPhase.CLOSED, "Closed")
            ending = self._table.everyone()
            for slot in ending:
                slot.state = self._without_default
        self._done.set()
        for slot in sorted(ending, key=lambda slot: slot.base is not None):  # requests end with their engines
            if slot.worker is not None:
                self._end(slot)

    def __enter__(self) -> EngineHost:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ── inside ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _slot(self, model_id: str | None, user: str | None = None) -> Slot:
        table = self._table
        if model_id in self.splits:
            return table.split(self.splits[model_id], user or secrets.token_hex())
        found = table.default if model_id is None else table.lookup(plain(model_id))
        if found is not None:
            return found
        if model_id is None or table.default is None or table.default.card is None:  # nobody can know yet
            raise not_ready(self.state())
        known = [slot.id for slot in table.in_order()]
        raise UnknownModelError(
            f"model {model_id!r} does not exist", value=model_id, limit=known, param="model",
            remedy=f"Models here: {', '.join(known)}.",
        )  # fmt: skip

    def _engine_slot(self, model_id: str) -> Slot:
        slot = self._slot(model_id)
        if slot.base is not None:
            raise ResidentInUseError(
                f"{slot.id} is an adapter of {slot.base.id} and has no engine of its own", value=slot.id, param="id",
                limit=slot.base.id, remedy=f"Name {slot.base.id}: its adapters sleep and wake with it.",
            )  # fmt: skip
        return slot

    def _load_default(self, slot: Slot) -> None:
        with self._loading:
            try:
                source = resolve_source(self._config.model, self._resolver)
                slot.source, slot.id = source, source.id
                self._loader.build(slot)
            except Exception as error:
                log.info("the model could not be loaded", exc_info=error)
                self._loader.fail(slot, error, "The model could not be loaded")
            finally:
                self._done.set()

    def _load(self, ref: str, wish: Wish, options: LoadOptions, *, wakes: bool = True) -> Resident:
        table = self._table
        with self._loading:
            if self._stopping.is_set():
                raise not_ready(self.state())
            source = resolve_source(ref, self._resolver)
            digest = source.digest or read_model_card(source.path).digest
            known = table.same(source, digest, options)
            found = known or (table.base_of(source, options) if source.adapter else None)
            if wakes and found is not None:
                self._sleeper.wake(found.base or found)
            if known is not None:
                with self._lock:
                    self._retire(table.grant(known, wish))
                    return table.describe(known)
            former = table.replaced_by(source, options)
            new_id = table.free_id(source, digest, options.suffix, former)
            slot = Slot(source, new_id, options, HostState(HostPhase.LOADING, "Starting"))
            return self._bring(slot, wish, former)

    def _bring(self, slot: Slot, wish: Wish, former: Slot | None) -> Resident:
        """Make a new slot resident in the place of `former`. `_loading` is held."""
        with self._lock:
            slot.holds += 1  # until its reason is noted
            self._table.add(slot)
        try:
            self._loader.build(slot)
        except BaseException as error:
            with self._lock:
                self._table.remove(slot)
            if not isinstance(error, Exception):
                raise
            typed = typed_error(error, f"{slot.source.ref} could not be loaded")
            raise typed from error.__cause__ if typed is error else error
        with self._lock:
            slot.holds -= 1
            self._retire(self._table.grant(slot, wish, former))
            return self._table.describe(slot)

    def _settle(self) -> None:
        self._retire(self._table.settle())

    def _retire(self, going: list[Slot]) -> None:
        """Let the models drain that the table gave up. Under the lock."""
        for slot in going:
            slot.state = HostState(HostPhase.DRAINING, "Running requests end", 1.0)
            threading.Thread(target=self._drain, args=(slot,), name="quire-drain", daemon=True).start()

    def _drain(self, slot: Slot) -> None:
        if slot.worker is not None:
            wait_until_idle(slot.worker, self._stopping)
        if not self._stopping.is_set():  # else close() ends it
            self._end(slot)

    def _end(self, slot: Slot) -> None:
        """Close a slot's worker and forget it."""
        worker, card = slot.worker, slot.card
        try:
            if worker is not None:
                worker.close()
                if self._on_closed is not None and card is not None:
                    self._on_closed(card, worker)
        finally:
            with self._lock:
                slot.worker, slot.state = None, HostState(HostPhase.CLOSED, "Closed")
                if slot is not self._table.default:
                    self._table.remove(slot)
            del worker
            if slot.base is None:
                give_memory_back()


def fake_host() -> EngineHost:
    """A started and ready host over `fake_worker`, for tests and work on pages."""
    from engine.config import EngineConfig

    host = EngineHost(EngineConfig(model=FAKE_MODEL), factory=fake_worker)
    host.start()
    host.wait(10)
    return host
