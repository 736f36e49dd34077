"""Model versions: the registry, fine-tuning, and the bundled demo models. Imports nothing heavy by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from workbench.settings import Settings
    from workbench.versions.ref import ResolvedVersion

__all__ = ["resolve"]


def resolve(ref: str, settings: Settings, *, merged: bool = True) -> ResolvedVersion:
    """The version that `ref` names now, and a folder that the engine can load: see `resolution.resolve`."""
    from workbench.versions.resolution import resolve as resolve_now

    return resolve_now(ref, settings, merged=merged)
