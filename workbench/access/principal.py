"""Principal: who asks, and with which rights, as every route, page and log may know it.

Boundary: a value. Who is believed to be whom is decided by keys (`workbench.access.keys`) and logins; what a request needs, by the
middleware in `workbench.api`, which leaves its principal in the ASGI scope under `SCOPE_KEY`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

SCOPE_KEY = "quire.principal"


class Right(StrEnum):
    """What a request may need. Each is given by itself; ADMIN includes the others."""

    INFER = "infer"  # ask a resident model
    READ = "read"  # see models, metrics, logs and records
    ADMIN = "admin"  # load and unload models, run notebooks and jobs, change schedules, aliases and keys


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks. `id` is safe to log: a key's public part or a login's name, never a secret."""

    id: str
    rights: frozenset[Right]

    def may(self, right: Right) -> bool:
        return right in self.rights or Right.ADMIN in self.rights


OWNER = Principal(
    "local", frozenset(Right)
)  # whoever reaches a loopback port of a server that asks for no key


def principal_of(scope: Mapping[str, Any]) -> Principal:
    """Who sent the request of this ASGI scope; OWNER where nothing stands in front that asks."""
    found = scope.get(SCOPE_KEY, OWNER)
    assert isinstance(found, Principal)
    return found
