"""The moves of an alias: recorded as tags of the registered model, read back as a history, and what a rollback leads to.

MLflow keeps only where an alias points now. Each move of ours is one more tag, written after the alias has moved; a move made
elsewhere (MLflow's own pages), or one whose tag was lost with a killed process, shows as a difference between the last tag and
the alias, and counts as a move without a reason. Rolling back undoes moves in order, so doing it twice goes two back.
"""

from __future__ import annotations

import getpass
import json
import re
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from workbench.versions.errors import InvalidAliasError

PREFIX = "quire.alias."
ELSEWHERE = "moved outside Quire"


@dataclass(frozen=True, slots=True)
class AliasMove:
    """One move. `at` is UTC, ISO 8601; None versions mean that the alias was not set."""

    at: str
    from_version: int | None
    to_version: int | None
    reason: str
    who: str
    is_rollback: bool = False


def check_alias(alias: str) -> None:
    """Raises InvalidAliasError for what the registry cannot hold or keeps for itself."""
    if (
        not re.fullmatch(r"[A-Za-z][\w-]{0,99}", alias)
        or alias.casefold() == "latest"
        or re.fullmatch(r"[vV]\d+", alias)
    ):
        raise InvalidAliasError(
            f"alias {alias!r} is not usable", value=alias, param="alias",
            limit="letters, digits, dash and underscore, a letter first; not 'latest', not v with a number",
            remedy="Choose another name, for example champion.",
        )  # fmt: skip


def new_move(
    from_version: int | None, to_version: int, reason: str, *, is_rollback: bool = False
) -> AliasMove:
    """A move that happens now, by this user."""
    return AliasMove(_now(), from_version, to_version, reason, _who(), is_rollback)


def tag_of(alias: str, move: AliasMove, tags: Mapping[str, str]) -> tuple[str, str]:
    """Key and value of the tag that records a move; keys sort by time, behind those in `tags` also where the clock was set back."""
    stem = f"{PREFIX}{alias}."
    known = [key.removeprefix(stem).partition("-")[0] for key in tags if key.startswith(stem)]
    at_ns = max([time.time_ns(), *(int(each) + 1 for each in known if each.isdecimal())])
    return f"{stem}{at_ns}-{secrets.token_hex(3)}", json.dumps(asdict(move))


def history(tags: Mapping[str, str], alias: str, current: int | None, changed_at: str) -> list[AliasMove]:
    """All moves, oldest first, ending at `current`. `changed_at`: when the registered model last changed (UTC, ISO)."""
    moves = [_parse(tags[key]) for key in sorted(tags) if key.startswith(f"{PREFIX}{alias}.")]
    complete: list[AliasMove] = []
    for move in moves:
        _bridge(complete, move.from_version, _shifted(move.at, -1))
        complete.append(move)
    _bridge(complete, current, changed_at)
    return complete


def _bridge(moves: list[AliasMove], reached: int | None, at: str) -> None:
    """Adds the move that nobody recorded, if the last one did not lead to `reached`."""
    before = moves[-1].to_version if moves else None
    if before == reached:
        return
    at = max(at, _shifted(moves[-1].at, 1)) if moves else at
    moves.append(AliasMove(at, before, reached, ELSEWHERE, ""))


def _shifted(at: str, microseconds: int) -> str:
    moved = datetime.fromisoformat(at) + timedelta(microseconds=microseconds)
    return moved.isoformat(timespec="microseconds")


def rollback_target(moves: Sequence[AliasMove]) -> int | None:
    """The version that a rollback leads to; None when there is nothing before."""
    stack: list[int | None] = []
    for move in moves:
        if move.is_rollback and len(stack) > 1 and move.to_version in stack[:-1]:
            while stack[-1] != move.to_version:
                stack.pop()
        elif not stack or stack[-1] != move.to_version:
            stack.append(move.to_version)
    earlier = [version for version in stack[:-1] if version is not None]
    return earlier[-1] if earlier else None


def _parse(value: str) -> AliasMove:
    row: dict[str, Any] = json.loads(value)
    return AliasMove(**row)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _who() -> str:
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container whose user has no name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"
