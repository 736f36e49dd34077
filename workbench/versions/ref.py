"""References to versions: how one is written (`NAME@alias`, `NAME/3`, `models:/…`, a folder, a hub id) and what it names.

A value's digest is its identity; name and number are how people call it, the path is a hint. Parsing only: `registry`
answers, `resolve` finds the weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

_NAME = r"[A-Za-z0-9][\w.\- ]*"
_ALIAS = re.compile(rf"(?:models:/)?({_NAME})@([A-Za-z][\w-]*)")
_NUMBER = re.compile(rf"(?:models:/)?({_NAME})/(\d+)")


@dataclass(frozen=True, slots=True)
class VersionRef:
    """One version. `adapter_digest` is empty for whole models, `version` None for folders and hub ids."""

    name: str
    version: int | None
    alias: str | None
    digest: str
    base_digest: str
    adapter_digest: str = ""
    quantization: str | None = None

    @property
    def id(self) -> str:
        """`NAME/VERSION`, or the name alone."""
        return self.name if self.version is None else f"{self.name}/{self.version}"


@dataclass(frozen=True, slots=True)
class ResolvedVersion:
    """A version and a folder that the engine can load: with the adapter merged in, or of the base that `adapter` belongs to."""

    ref: VersionRef
    folder: Path
    adapter: Path | None = None  # its folder, where it is not merged
    merge: Callable[[], Path] | None = field(default=None, compare=False)  # makes the folder that holds both


@dataclass(frozen=True, slots=True)
class RegistryAddress:
    """A name in the registry with either a number or an alias."""

    name: str
    version: int | None = None
    alias: str | None = None


def parse_address(text: str) -> RegistryAddress | None:
    """The registry address that a text is, or None when it is a folder or a hub id."""
    if match := _ALIAS.fullmatch(text):
        return RegistryAddress(match[1], alias=match[2])
    if match := _NUMBER.fullmatch(text):
        return RegistryAddress(match[1], version=int(match[2]))
    return None
