"""From what a person writes to what can be loaded: a folder, a hub id, or a version of the registry.

``NAME/3``, ``NAME@alias`` and ``models:/…`` belong to the registry and go through a resolver (``workbench.versions.resolve``),
and so do folders of adapters; a folder that exists is a folder; everything else is taken for a hub id, which the engine's
loader will find or not. ``NAME:3``, as MLflow's pages write a version, means ``NAME/3``.

Boundary: names and paths. It loads nothing, and reads nothing of a folder.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.errors import UnknownModelError

if TYPE_CHECKING:
    from workbench.versions.ref import ResolvedVersion

Resolver = Callable[[str], "ResolvedVersion"]
_VERSION = re.compile(r"(?P<name>[^/@:]+)[/:](?P<version>[1-9]\d*)")
_ALIAS = re.compile(r"(?P<name>[^/@]+)@(?P<alias>[^/@\s]+)")
_SCHEME = "models:/"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """What to load, and under which name it will be asked for."""

    ref: str
    id: str
    path: str  # a folder or a hub id; of an adapter: its base's
    name: str | None = None  # in the registry
    version: int | None = None
    alias: str | None = None  # as it was asked for: NAME@alias
    digest: str = ""  # as the registry has it; "": what the folder says
    adapter: str | None = None  # a folder; None: a whole model
    base_digest: str = ""  # of what is at `path`, where there is an adapter
    merge: Callable[[], Path] | None = field(default=None, compare=False)  # makes a whole model of both


def plain(ref: str) -> str:
    """`ref` without the registry's scheme."""
    return ref.strip().removeprefix(_SCHEME)


def alias_of(ref: str) -> tuple[str, str] | None:
    """Name and alias of ``NAME@alias``, with or without scheme; None for anything else."""
    found = _ALIAS.fullmatch(plain(ref))
    return (found["name"], found["alias"]) if found else None


def version_of(ref: str) -> tuple[str, int] | None:
    """Name and version of ``NAME/3``, with or without scheme; None for anything else."""
    found = _VERSION.fullmatch(plain(ref))
    return (found["name"], int(found["version"])) if found else None


def resolve_source(ref: str, resolver: Resolver | None) -> ModelSource:
    """What `ref` means now. A registered version is looked up by `resolver`, which may give an adapter over its base.

    Raises:
        UnknownModelError: empty, or a registered version where there is no registry.
        WorkbenchError: from the resolver.
    """
    if not plain(ref):
        raise UnknownModelError(
            "no model was named", value=ref, param="model", remedy="Name a folder, a hub id or NAME@alias."
        )
    registered = ref.strip().startswith(_SCHEME) or alias_of(ref) or version_of(ref)
    folder = Path(ref).expanduser()
    perhaps_adapter = folder.is_dir() and not (folder / "config.json").is_file()
    if perhaps_adapter and resolver is not None:
        return _source(ref, folder.resolve().name, resolver(ref))
    if not registered or folder.is_dir():
        return ModelSource(ref, _folder_id(ref), ref)
    if resolver is None:
        raise UnknownModelError(
            f"{ref!r} names a registered version, and there is no registry here", value=ref, param="model",
            remedy="Name a folder or a hub id.",
        )  # fmt: skip
    address = version_of(ref)
    found = resolver(f"{address[0]}/{address[1]}" if address else ref)
    return _source(ref, f"{found.ref.name}/{found.ref.version}", found, name=found.ref.name)


def _source(ref: str, model_id: str, found: ResolvedVersion, name: str | None = None) -> ModelSource:
    """`name`: in the registry."""
    alias = alias_of(ref)
    return ModelSource(
        ref,
        model_id,
        str(found.folder),
        name=name,
        version=found.ref.version if name else None,
        alias="@".join(alias) if alias and name else None,
        digest=found.ref.digest or "",
        adapter=None if found.adapter is None else str(found.adapter),
        base_digest=found.ref.base_digest if found.adapter else "",
        merge=found.merge,
    )


def _folder_id(path: str) -> str:
    folder = Path(path).expanduser()
    return folder.resolve().name if folder.is_dir() else path
