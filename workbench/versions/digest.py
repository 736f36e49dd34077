"""The content identity of a model folder. Standard library only, so that training machines need nothing else for it."""

from __future__ import annotations

import hashlib
from pathlib import Path

_HASHED_SUFFIXES = (".safetensors", ".gguf", ".json", ".jinja", ".model", ".txt")
NOT_IDENTITY = frozenset({"prompt_chips.json", "figures.json"})
"""Files about the model, not the model."""


def identity_files(folder: Path) -> list[Path]:
    """The files whose names and contents make the digest, in name order; a model that is one file is itself."""
    if folder.is_file():
        return [folder]
    return [
        file
        for file in sorted(folder.iterdir())
        if file.suffix in _HASHED_SUFFIXES and file.name not in NOT_IDENTITY and file.is_file()
    ]


def folder_digest(folder: Path) -> str:
    """SHA-256 over the names and contents of the files that make the model, in name order."""
    total = hashlib.sha256()
    for file in identity_files(folder):
        with file.open("rb") as opened:
            content = hashlib.file_digest(opened, "sha256").hexdigest()
        total.update(f"{file.name}\0{content}\n".encode())
    return total.hexdigest()
