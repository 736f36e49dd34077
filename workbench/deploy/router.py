"""PrefixSlotsRouter: Ray Serve's request router of the engine's replicas: the prompt's prefix first, as far as slots allow.

Each gateway has one. It counts what it sent itself at once and hears of the rest once a second (`record_routing_stats` of
the replica). Ray asks the replicas in the order given and takes the first that accepts.

Boundary: Ray's interface (alpha in 2.60); the choice is ``workbench.deploy.prefix``'s.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from ray.serve.request_router import RequestRouter

from workbench.deploy.prefix import Load, PrefixMemory, rank
from workbench.deploy.wire import HttpRequest


class PrefixSlotsRouter(RequestRouter):  # type: ignore[misc]
    """Routes `HttpRequest`s."""

    def initialize_state(self, *, num_slots: int = 256) -> None:
        """`num_slots`: rows of a replica's batch, until it has told itself."""
        self._num_slots = num_slots
        self._memory = PrefixMemory()
        self._sent: Counter[str] = Counter()

    async def choose_replicas(
        self, candidate_replicas: list[Any], pending_request: Any | None = None
    ) -> list[list[Any]]:
        """One replica a rank, first choice first."""
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        loads = {name: self._load(name, replica.routing_stats) for name, replica in by_id.items()}
        matches = self._memory.matches(_prefix(pending_request))
        return [[by_id[name]] for name in rank(loads, matches)]

    def on_request_routed(self, pending_request: Any, replica_id: Any, result: Any) -> None:
        """The replica has accepted it."""
        self._sent[replica_id.unique_id] += 1
        self._memory.remember(_prefix(pending_request), replica_id.unique_id)

    def on_request_completed(self, replica_id: Any, internal_request_id: str) -> None:
        """It has ended, however."""
        self._sent[replica_id.unique_id] -= 1
        if self._sent[replica_id.unique_id] <= 0:
            del self._sent[replica_id.unique_id]

    def _load(self, name: str, told: dict[str, Any]) -> Load:
        num_requests = max(self._sent[name], int(told.get("num_requests", 0)))
        return Load(
            num_requests, int(told.get("num_slots", self._num_slots)), int(told.get("num_waiting_tokens", 0))
        )


def _prefix(pending_request: Any | None) -> tuple[str, ...]:
    given = pending_request.args[0] if pending_request is not None and pending_request.args else None
    return given.prefix if isinstance(given, HttpRequest) else ()
