"""FeedbackKeeper: feedback goes from the outbox onto MLflow's traces by itself, beside the event loop.

One thread looks into the outbox every few seconds, which costs one query; only where something waits is MLflow asked, whose client
takes seconds to import. While MLflow does not answer, or what waits has no trace, it waits longer and longer; new feedback is tried
at once. A request that was not sampled gets its trace from the request log first.

Boundary: when, and with which client. What is sent and how, is `feedback`'s.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from workbench.observe import feedback
from workbench.observe.trace_export import trace_maker

if TYPE_CHECKING:
    from workbench.settings import Settings
    from workbench.store import Store

log = logging.getLogger(__name__)
_EVERY_S = 5.0
_MOST_S = 600.0  # between two attempts while nothing can be sent
_CLOSE_S = 2.0


class FeedbackKeeper:
    """`connect`: an MlflowClient, or None while MLflow does not answer; `make_trace`: as in `feedback.flush`."""

    def __init__(
        self,
        store: Store,
        connect: Callable[[], Any],
        make_trace: Callable[[str], bool] | None = None,
        *,
        every_s: float = _EVERY_S,
    ) -> None:
        self._store = store
        self._connect = connect
        self._make_trace = make_trace
        self._every_s = every_s
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="quire-feedback", daemon=True)

    @classmethod
    def of(cls, settings: Settings, store: Store) -> FeedbackKeeper:
        """With the MLflow of the settings; traces are made where it is a server."""
        is_server = settings.mlflow_url.startswith("http")
        return cls(store, lambda: _client(settings), trace_maker(settings) if is_server else None)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End the thread; an MLflow that hangs is not waited for."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        retry_s, waited_s = self._every_s, 0.0  # until what could not be sent is tried again
        left = 0  # that could not be sent the last time
        while not self._closing.wait(self._every_s):
            waited_s += self._every_s
            unsent, sent = left, 0
            try:
                unsent = feedback.num_unsent(self._store)
                if not unsent or (unsent <= left and waited_s < retry_s):
                    left = min(left, unsent)
                    continue
                sent = self._flush()
            except Exception as error:  # noqa: BLE001 - the thread's boundary: whatever MLflow or the store raise, later again
                log.warning("feedback could not be sent to MLflow, it stays in the outbox: %s", error)
            left = unsent - sent
            retry_s, waited_s = (self._every_s if sent else min(2 * retry_s, _MOST_S)), 0.0

    def _flush(self) -> int:
        client = self._connect()
        if client is None:
            return 0
        return feedback.flush(self._store, client, make_trace=self._make_trace, stopping=self._closing.is_set)


def _client(settings: Settings) -> Any:
    """MLflow's client. Our own server's database is not opened beside it: that server may just be migrating it."""
    from workbench import tracking

    is_own = settings.mlflow_tracking_uri in (None, tracking.own_server(settings))
    if is_own and not tracking.answers(settings.mlflow_url):
        return None
    return tracking.client(settings)
