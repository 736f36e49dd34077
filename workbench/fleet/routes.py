"""Routes: public names whose requests go to one of several endpoints, whichever has room.

    QUIRE_ROUTES="chat=endpoint:one/qwen3,endpoint:two/qwen3"

Beside ``QUIRE_SPLIT``, which divides one name's users between models of this process by weight (``workbench.traffic``), a route
chooses between servers by what is free there.

Boundary: the text of the setting. Which of the endpoints gets a request is `router`'s.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from workbench.errors import SettingsError

_VARIABLE = "QUIRE_ROUTES"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,127}")
_TARGET = re.compile(r"endpoint:([A-Za-z0-9][A-Za-z0-9_.-]{0,63})/(\S+)")


@dataclass(frozen=True, slots=True)
class Target:
    """One of a route's endpoints, and the model that is asked for there."""

    endpoint: str
    model: str

    def __str__(self) -> str:
        return f"endpoint:{self.endpoint}/{self.model}"


@dataclass(frozen=True, slots=True)
class Route:
    """A public name and who may answer to it."""

    name: str
    targets: tuple[Target, ...]


def parse_routes(text: str) -> tuple[Route, ...]:
    """``name=endpoint:NAME/MODEL,endpoint:NAME/MODEL``, several of them separated by semicolons.

    Raises:
        SettingsError: a name that is none, or is there twice; a target that is none, or is there twice.
    """
    routes: list[Route] = []
    for part in filter(None, (each.strip() for each in text.split(";"))):
        name, equals, given = (piece.strip() for piece in part.partition("="))
        if not equals or not _NAME.fullmatch(name):
            raise _refused(f"{part!r} does not begin with a name of letters, digits, dots, dashes", text)
        if any(route.name == name for route in routes):
            raise _refused(f"{name!r} is there twice", text)
        routes.append(Route(name, tuple(_targets(given, text))))
    return tuple(routes)


def _targets(given: str, text: str) -> list[Target]:
    targets: list[Target] = []
    for part in given.split(","):
        found = _TARGET.fullmatch(part.strip())
        if found is None:
            raise _refused(f"{part.strip()!r} is no endpoint's model", text)
        target = Target(found[1], found[2])
        if target in targets:
            raise _refused(f"{target} is there twice", text)
        targets.append(target)
    return targets


def _refused(what: str, value: str) -> SettingsError:
    return SettingsError(
        f"{_VARIABLE}={value} is not accepted: {what}", value=value, limit="name=endpoint:NAME/MODEL,endpoint:NAME/MODEL; …",
        param=_VARIABLE, remedy="Set it like chat=endpoint:one/qwen3,endpoint:two/qwen3.",
    )  # fmt: skip
