"""What pages know of the registry and of what is resident, joined: one `VersionRow` a version, read through `Readings`.

No Streamlit here: rows and lookups. The registry is MLflow's and slow; the host's residents are in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.ui import resources
from workbench.ui.readings import Reading

if TYPE_CHECKING:
    from workbench.resident import Resident
    from workbench.ui.resources import PageServices
    from workbench.versions.registry import AliasMove, VersionInfo

REGISTRY = "registry"  # the subject of every reading here
CHAMPION = "champion"
TTL_S = 10.0  # what our own pages change is told at once (Readings.forget)


@dataclass(frozen=True, slots=True)
class VersionRow:
    """One registered version and whether it is resident here."""

    info: VersionInfo
    resident_id: str | None
    is_default: bool
    resident: Resident | None = None

    @property
    def name(self) -> str:
        return self.info.ref.name

    @property
    def version(self) -> int:
        return int(self.info.ref.version or 0)

    @property
    def ref(self) -> str:
        return f"{self.name}/{self.version}"


def history(services: PageServices, name: str, alias: str = CHAMPION) -> Reading[list[AliasMove]]:
    """The moves of an alias, newest first."""
    return resources.readings().get(
        (REGISTRY, "history", name, alias),
        lambda: sorted(services.registry().history(name, alias), key=lambda move: str(move.at), reverse=True),
        ttl_s=TTL_S,
    )


def versions_of(found: Mapping[str, VersionInfo], name: str) -> list[VersionInfo]:
    """The versions of a name, newest first."""
    own = [info for info in found.values() if info.ref.name == name]
    return sorted(own, key=lambda info: -int(info.ref.version or 0))


def signature(found: Mapping[str, VersionInfo]) -> list[tuple[str, tuple[str, ...]]]:
    """What a page must be drawn again for: which versions there are and what the aliases name."""
    return sorted((ref, info.aliases) for ref, info in found.items())


def rows(found: list[VersionInfo]) -> list[VersionRow]:
    """Joined with what is resident, by the version's id and by its digest."""
    residents = list(resources.host().resident())
    return [_row(info, residents) for info in found]


def _row(info: VersionInfo, residents: list[Any]) -> VersionRow:
    own = f"{info.ref.name}/{info.ref.version}"
    named = sorted(
        (r for r in residents if r.id.partition("#")[0] == own), key=lambda r: r.id != own
    )  # the one without options first
    same = [r for r in residents if info.ref.digest and r.digest == info.ref.digest]
    found = (named or same or [None])[0]
    return VersionRow(info, found.id if found else None, bool(found and found.is_default), found)


def alias_of(found: list[VersionInfo], alias: str = CHAMPION) -> VersionInfo | None:
    """The version that the alias names."""
    return next((info for info in found if alias in info.aliases), None)


def previous(services: PageServices, name: str, alias: str = CHAMPION) -> Reading[int]:
    """The version that a roll back leads to; 0 when there is none."""
    return resources.readings().get(
        (REGISTRY, "previous", name, alias),
        lambda: services.registry().previous(name, alias=alias) or 0,
        ttl_s=TTL_S,
    )


def was_promoted(moves: Iterable[AliasMove]) -> bool:
    """Whether somebody has ever moved the alias on to another version; setting it for the first time is none."""
    return any(move.from_version is not None and not move.is_rollback for move in moves)


def was_rolled_back(moves: Iterable[AliasMove]) -> bool:
    return any(move.is_rollback for move in moves)


def all_versions(services: PageServices) -> Reading[dict[str, VersionInfo]]:
    """Every registered version by its `NAME/VERSION`."""
    return resources.readings().get(
        (REGISTRY, "all"),
        lambda: {f"{info.ref.name}/{info.ref.version}": info for info in services.registry().versions()},
        ttl_s=TTL_S,
    )


def dataset_names(services: PageServices) -> Reading[list[str]]:
    from workbench.evals import datasets

    return resources.readings().get(
        ("datasets",), lambda: datasets.dataset_names(services.settings), ttl_s=10.0
    )


def scorer_names() -> list[str]:
    from workbench.evals.scorers import SCORERS

    return sorted(SCORERS)
