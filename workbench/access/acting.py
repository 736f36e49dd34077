"""On whose behalf this thread or task works, for the audit log and for limits: known without a parameter on every way.

Who lets somebody in (the API's keys, a page's login) says so with `acting_as`; threads started by ``asyncio.to_thread`` and tasks
inherit it, other threads do not.

Boundary: one context variable.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from workbench.access.principal import OWNER, Principal

_acting: ContextVar[Principal] = ContextVar("quire_acting", default=OWNER)


def acting() -> Principal:
    """Who acts; the machine's owner where nobody said who."""
    return _acting.get()


@contextmanager
def acting_as(principal: Principal) -> Iterator[None]:
    """What runs inside is done by `principal`."""
    token = _acting.set(principal)
    try:
        yield
    finally:
        _acting.reset(token)
