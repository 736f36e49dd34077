"""Router: which of a route's endpoints gets the next request: the one that has its prefix cached if it has room, else the freest.

Room is slots: what an instance can run at once less what runs and waits there, as it said last, corrected by what this router has
sent and seen ended since. A prompt's prefix belongs to whoever answered it last; it draws the next request that begins alike, as
long as a slot is free there, since waiting costs more than computing a prefix again.

An endpoint that failed is left alone for a time that doubles; one that drains, loads or is not ready gets nothing new.

Boundary: the choice, on one thread. Readings come from ``workbench.fleet.status``, requests are sent by ``workbench.api.forward``.
Sources of the idea: SGLang's cache-aware load balancer (2024); Ray Serve's prefix-affinity router.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from workbench.errors import NotReadyError
from workbench.fleet.routes import Route, Target
from workbench.fleet.status import READY, Status

CHUNK_CHARS = 256  # some 64 tokens: shorter beginnings are alike by chance, and soon computed
MAX_CHUNKS = 64  # of one prompt
MAX_PREFIXES = 50_000
UNKNOWN_SLOTS = 32  # of a server that does not say how many requests it can run
_FIRST_REST_S, _LONGEST_REST_S = 1.0, 30.0


class NoInstanceError(NotReadyError):
    """None of a route's endpoints can take a request now."""

    code = "no_instance"


@dataclass(slots=True)
class _Known:
    """What is known of one endpoint."""

    status: Status | None = None
    in_flight: int = 0  # sent from here, not yet ended
    since: int = 0  # sent less ended since `status` was read
    failures: int = 0  # one after the other
    rests_until: float = 0.0
    reason: str = "not asked yet"
    chosen_at: int = 0

    @property
    def free(self) -> int:
        """Slots, as far as they are known."""
        if self.status is None:
            return UNKNOWN_SLOTS - self.in_flight
        told = self.status.free_slots
        if told is None:
            running = self.status.running
            if running is None:
                return UNKNOWN_SLOTS - self.in_flight
            told = UNKNOWN_SLOTS - running - (self.status.waiting or 0)
        return told - self.since


class Router:
    """Chooses, and is told what came of it. One thread: an event loop's."""

    def __init__(self, routes: Sequence[Route], clock: Callable[[], float] = time.monotonic) -> None:
        self.routes = {route.name: route for route in routes}
        self._clock = clock
        self._known = {target.endpoint: _Known() for route in routes for target in route.targets}
        self._prefixes: OrderedDict[bytes, str] = OrderedDict()  # a beginning's digest: who answered it last
        self._choices = 0

    @property
    def endpoints(self) -> list[str]:
        """The names of all endpoints that are routed to."""
        return list(self._known)

    def order(self, route: Route, prefix: Sequence[bytes]) -> list[Target]:
        """The targets to try, the best first. `prefix`: as `prefix_of` gives it.

        Raises:
            NoInstanceError: there is none; with each one's reason.
        """
        now = self._clock()
        usable = [t for t in route.targets if self._is_usable(self._known[t.endpoint])]
        rested = [t for t in usable if self._known[t.endpoint].rests_until <= now]
        if not usable:
            reasons = "; ".join(f"{t.endpoint}: {self._known[t.endpoint].reason}" for t in route.targets)
            raise NoInstanceError(
                f"no instance of {route.name} takes requests now ({reasons})", value=route.name, param="model",
                remedy="Send it again in some seconds.",
            )  # fmt: skip
        holder = self._holder(prefix)

        def rank(target: Target) -> tuple[bool, int, int]:
            known = self._known[target.endpoint]
            return (target.endpoint != holder or known.free <= 0, -known.free, known.chosen_at)

        # Who failed a moment ago is tried last, but tried: it may be back, and there may be nobody else.
        return sorted(rested, key=rank) + sorted((t for t in usable if t not in rested), key=rank)

    def began(self, target: Target, prefix: Sequence[bytes]) -> None:
        """A request is sent to it."""
        known = self._known[target.endpoint]
        self._choices += 1
        known.chosen_at = self._choices
        known.in_flight += 1
        known.since += 1
        for digest in prefix:
            self._prefixes[digest] = target.endpoint
            self._prefixes.move_to_end(digest)
        while len(self._prefixes) > MAX_PREFIXES:
            self._prefixes.popitem(last=False)

    def ended(self, target: Target) -> None:
        """What `began` told has ended, however."""
        known = self._known[target.endpoint]
        known.in_flight -= 1
        known.since -= 1

    def told(self, endpoint: str, status: Status) -> None:
        """A reading of it."""
        known = self._known[endpoint]
        known.status, known.since = status, 0
        known.reason = status.message or status.state
        known.failures, known.rests_until = 0, 0.0

    def failed(self, endpoint: str, reason: str) -> None:
        """It did not answer, or not with an answer."""
        known = self._known[endpoint]
        rest = min(_LONGEST_REST_S, _FIRST_REST_S * 2 ** min(known.failures, 10))
        known.failures += 1
        known.rests_until = self._clock() + rest
        known.reason = reason

    def _is_usable(self, known: _Known) -> bool:
        return known.status is None or known.status.state == READY

    def _holder(self, prefix: Sequence[bytes]) -> str | None:
        """Who answered the longest known beginning of it."""
        return next((self._prefixes[each] for each in reversed(prefix) if each in self._prefixes), None)


def prefix_of(text: str) -> list[bytes]:
    """The digests of a prompt's beginnings, one a chunk, the shortest first; each stands for all before it."""
    chain, digests = b"", []
    for start in range(0, min(len(text) - CHUNK_CHARS + 1, MAX_CHUNKS * CHUNK_CHARS), CHUNK_CHARS):
        chunk = text[start : start + CHUNK_CHARS].encode("utf-8", "replace")
        chain = hashlib.blake2b(chain + chunk, digest_size=16).digest()
        digests.append(chain)
    return digests
