"""What pages share: the host, settings, jobs, store and registry, given once by the app's lifespan, and the page's own caches.

Streamlit runs a page from its path and passes it nothing, so this one seam holds what the composition root made. Pages
read `host()`, `services()`, `conversations()`, `columns(worker)`, `readings()` and `actions()`; nothing else here is state.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from workbench.ui.actions import Actions
from workbench.ui.conversations import Conversations
from workbench.ui.readings import Readings
from workbench.ui.step_columns import StepColumns

if TYPE_CHECKING:
    from engine.worker import EngineWorker
    from workbench.access.logins import Logins
    from workbench.host import EngineHost
    from workbench.jobs import Jobs
    from workbench.limits import LimitStore
    from workbench.settings import Settings
    from workbench.store import Store
    from workbench.versions.registry import Registry


class PageServices:
    """The services of one app, made when they are first asked for: importing MLflow's client takes a second."""

    def __init__(self, settings: Settings, jobs: Jobs, store: Store, limits: LimitStore) -> None:
        self.settings = settings
        self.jobs = jobs
        self.store = store
        self.limits = limits
        self._lock = threading.Lock()
        self._registry: Registry | None = None

    def registry(self) -> Registry:
        """The registry's client. Not for the script thread: its first call imports MLflow."""
        from workbench.versions.registry import Registry

        with self._lock:
            if self._registry is None:
                self._registry = Registry(self.settings)
            return self._registry


@dataclass(slots=True)
class _Provided:
    """The holder. Written by `provide` alone."""

    host: EngineHost | None = None
    services: PageServices | None = None
    conversations: Conversations = field(default_factory=Conversations)
    columns: weakref.WeakKeyDictionary[EngineWorker, StepColumns] = field(
        default_factory=weakref.WeakKeyDictionary
    )
    readings: Readings = field(default_factory=Readings)
    actions: Actions | None = None
    logins: Logins | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


_provided = _Provided()


def provide(
    host: EngineHost | None,
    *,
    settings: Settings | None = None,
    jobs: Jobs | None = None,
    store: Store | None = None,
    limits: LimitStore | None = None,
    logins: Logins | None = None,
) -> None:
    """Make `host` and the services the ones that pages see; what belonged to earlier ones is dropped. None takes it away.

    With `settings` alone the stores of its HOME_DIR are opened here.
    """
    _provided.conversations.close()
    _provided.host = host
    _provided.logins = logins
    _provided.services = None if settings is None else _services(settings, jobs, store, limits)
    _provided.conversations = Conversations()
    _provided.columns = weakref.WeakKeyDictionary()
    _provided.readings = Readings()
    if _provided.actions is not None:
        _provided.actions.close()
    _provided.actions = None if host is None else Actions()


def _services(
    settings: Settings, jobs: Jobs | None, store: Store | None, limits: LimitStore | None
) -> PageServices:
    from workbench.jobs import Jobs
    from workbench.limits import LimitStore
    from workbench.store import open_store

    store = store or open_store(settings.home_dir)
    limits = limits or LimitStore(settings.home_dir)
    return PageServices(settings, jobs or Jobs(store, settings.home_dir), store, limits)


def asks_for_keys() -> bool:
    """Whether the API asks for a key: by its settings, or since one was made; seconds old. Raises StoreError."""
    from workbench.access import keys

    found = services()
    if found is None:
        return False
    return found.settings.require_key or readings().read(
        "asks for keys", lambda: bool(keys.listed(found.store)), 5.0
    )


def host() -> EngineHost:
    """The host. Raises RuntimeError when no app has provided one."""
    if _provided.host is None:
        raise RuntimeError("no engine host: pages run inside the app (`quire up` or `quire serve`)")
    return _provided.host


def services() -> PageServices | None:
    """Settings, jobs, store and registry; None in an app that keeps no records."""
    return _provided.services


def logins() -> Logins | None:
    """Who is logged in; None in an app that keeps no records, and so has no logins."""
    return _provided.logins


def conversations() -> Conversations:
    return _provided.conversations


def readings() -> Readings:
    return _provided.readings


def actions() -> Actions:
    """The actions. Raises RuntimeError when no app has provided a host."""
    if _provided.actions is None:
        raise RuntimeError("no engine host: pages run inside the app (`quire up` or `quire serve`)")
    return _provided.actions


def columns(worker: EngineWorker) -> StepColumns:
    """The step columns of a worker, one set for all sessions."""
    with _provided.lock:
        found = _provided.columns.get(worker)
        if found is None:
            found = StepColumns(worker.records, worker.config.record_seconds)
            _provided.columns[worker] = found
        return found
