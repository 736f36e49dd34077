"""Services of the app process: store, jobs, request log, alias watcher, and the demo's seeding; opened and closed together.

`open` makes what requests and pages need and raises typed errors; `start` sets the threads going that work by themselves.

Boundary: wiring and order. What each part does is its own room's.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

from workbench.access.audit import Audit
from workbench.access.logins import Logins
from workbench.alias_watcher import AliasWatcher, Lookup, registry_lookup
from workbench.errors import WorkbenchError
from workbench.limits import LimitKeeper, LimitStore
from workbench.observe.feedback_keeper import FeedbackKeeper
from workbench.observe.retention import RetentionKeeper
from workbench.observe.trace_export import Destination, destinations
from workbench.settings import Settings

if TYPE_CHECKING:
    from engine.worker import EngineWorker
    from workbench.access.key_ring import KeyRing
    from workbench.host import EngineHost
    from workbench.jobs import JobRunner, Jobs
    from workbench.model_card import ModelCard
    from workbench.observe.request_log import RequestLog
    from workbench.store import Store

log = logging.getLogger(__name__)
SEED_KIND = "seed_demo"
SEEDED_ALIAS = ("ticket-extractor", "champion")  # set by the seeding job at its end


class Services:
    """What an app process keeps besides its engines. `settings.home_dir` must exist. Thread-safe."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.store: Store | None = None
        self.jobs: Jobs | None = None
        self.request_log: RequestLog | None = None
        self.keys: KeyRing | None = None
        self.audit = Audit()
        self.limits = LimitStore(settings.home_dir)
        self.logins = Logins(settings)
        self.traces: list[Destination] = []
        self._runner: JobRunner | None = None
        self._watcher: AliasWatcher | None = None
        self._keeper: LimitKeeper | None = None
        self._retention: RetentionKeeper | None = None
        self._feedback: FeedbackKeeper | None = None
        self._lock = threading.Lock()

    def open(self) -> None:
        """Open store and request log. A second call does nothing. Raises StoreError, RequestLogError."""
        from workbench.access.key_ring import KeyRing
        from workbench.jobs import Jobs
        from workbench.observe.request_log import RequestLog
        from workbench.store import open_store

        with self._lock:
            if self.store is not None:
                return
            store = open_store(self.settings.home_dir)
            try:
                self.logins.open(store)
                self.request_log = RequestLog(self.settings.home_dir, text=self.settings.request_text)
            except BaseException:
                store.close()
                raise
            self.store, self.jobs = store, Jobs(store, self.settings.home_dir)
            self.audit.store, self.keys = store, KeyRing(store)
            self.traces = destinations(self.settings)
            if self.traces:
                self.request_log.on_row = self._trace

    def attach(self, card: ModelCard, worker: EngineWorker) -> None:
        """Log the requests of a worker that is about to start, and count them for the keys that ask."""
        if self.request_log is not None:
            worker.add_sink(self.request_log.sink(card.id, card.digest, worker.lora))
        if self.keys is not None:
            worker.add_sink(self.keys.meter)

    def start(self, host: EngineHost) -> None:
        """Run jobs, follow aliases, and measure the machine when it is idle, from now on."""
        from workbench.jobs import JobRunner

        assert self.jobs is not None, "open() comes first"
        self._runner = JobRunner(self.jobs, self.settings)
        self._runner.start()
        lookup = registry_lookup(self.settings)
        self._watcher = AliasWatcher(
            host, lookup, self.settings.follow_refs, on_reachable=lambda: self._seed(lookup)
        )
        self._watcher.start()
        self._keeper = LimitKeeper(host.worker, self.limits)
        self._keeper.start()
        assert self.store is not None
        self._retention = RetentionKeeper(self.settings.home_dir, self.store, self.settings.retention_days)
        self._retention.start()
        self._feedback = FeedbackKeeper.of(self.settings, self.store)
        self._feedback.start()

    def stop(self) -> None:
        """End the threads that work by themselves: limits, the alias watcher, and the jobs with their processes."""
        for part in (self._feedback, self._retention, self._keeper, self._watcher, self._runner):
            if part is not None:
                part.close()

    def close(self) -> None:
        """Write what is queued and close the files; after the engines have ended. A second call does nothing."""
        with self._lock:
            request_log, store = self.request_log, self.store
        if request_log is not None:
            request_log.close()
        if self.keys is not None:
            self.keys.close()
        for destination in self.traces:
            destination.close()
        if store is not None:
            store.close()

    def _trace(self, row: dict[str, Any]) -> None:
        for destination in self.traces:
            destination.put(row)

    def _seed(self, lookup: Lookup) -> None:
        """Have the bundled versions registered; nothing when they are. The job itself repeats nothing either."""
        from workbench.jobs import JobState

        jobs, settings = self.jobs, self.settings
        if jobs is None or not settings.demo or settings.fake or settings.model is not None:
            return
        known = [JobState.QUEUED, JobState.RUNNING]
        try:
            if lookup(*SEEDED_ALIAS) is not None:
                known.append(JobState.DONE)
            if not jobs.list(states=known, kind=SEED_KIND, limit=1):
                jobs.submit(SEED_KIND, {}, title="Register the bundled versions", device="none")
        except WorkbenchError as error:
            log.warning("the bundled versions are not registered: %s", error)
