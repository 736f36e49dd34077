"""LoginThrottle: failed passwords slow down who sends them, and nobody else.

Tries are counted by peer and by (user, peer); beyond a few, each costs a wait that doubles. A user under attack from many peers
is slowed by a short, fixed wait alone, and not at all where they have logged in before: nobody can lock another out.

Boundary: counting, in memory. A restart forgets, which a guesser cannot bring about.
"""

from __future__ import annotations

import ipaddress
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

FREE_TRIES = 5  # of a pair; a peer, which may be a whole office, has four times as many
MAX_WAIT_S = 60.0
USER_WAIT_S = 2.0
FORGET_S = 900.0
_MAX_KEYS = 20_000  # the longest untouched are forgotten


class LoginThrottle:
    """Thread-safe. `clock`: monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._failed: OrderedDict[tuple[str, ...], tuple[int, float]] = OrderedDict()  # key: count, last
        self._known: OrderedDict[tuple[str, str], None] = OrderedDict()  # pairs that have logged in

    def wait_s(self, user: str, peer: str) -> float:
        """Seconds until this pair may try again; 0: now."""
        peer = network_of(peer)
        with self._lock:
            waits = [self._wait(("pair", user, peer), FREE_TRIES), self._wait(("peer", peer), 4 * FREE_TRIES)]
            if (user, peer) not in self._known:
                waits.append(min(self._wait(("user", user), 8 * FREE_TRIES), USER_WAIT_S))
            return max(waits)

    def tried(self, user: str, peer: str) -> None:
        """Count a try as failed, before it is judged: tries at the same time are not free."""
        peer, now = network_of(peer), self._clock()
        with self._lock:
            for key in (("pair", user, peer), ("peer", peer), ("user", user)):
                count, last = self._failed.pop(key, (0, now))
                self._failed[key] = (1 if now - last > FORGET_S else count + 1), now
            while len(self._failed) > _MAX_KEYS:
                self._failed.popitem(last=False)

    def succeeded(self, user: str, peer: str) -> None:
        """The try that was counted last was no failure."""
        peer = network_of(peer)
        with self._lock:
            self._failed.pop(("pair", user, peer), None)
            for key in (("peer", peer), ("user", user)):
                if key in self._failed:
                    count, last = self._failed[key]
                    self._failed[key] = count - 1, last
            self._known.pop((user, peer), None)
            self._known[user, peer] = None
            while len(self._known) > _MAX_KEYS:
                self._known.popitem(last=False)

    def _wait(self, key: tuple[str, ...], free: int) -> float:
        count, last = self._failed.get(key, (0, 0.0))
        if count < free or self._clock() - last > FORGET_S:
            return 0.0
        return max(0.0, last + min(2.0 ** min(count - free, 10), MAX_WAIT_S) - self._clock())


def network_of(peer: str) -> str:
    """An address as one party: an IPv6 host has a whole /64 to itself."""
    try:
        address = ipaddress.ip_address(peer)
    except ValueError:
        return peer
    return str(ipaddress.ip_network((address, 64), strict=False)) if address.version == 6 else peer
