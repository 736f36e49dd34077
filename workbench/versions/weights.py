"""Finding weights by their digest: the registered path is a hint, what the files hold is the identity.

Looked at, in this order: the hint, the project's own `data/models`, `HOME_DIR/models`, adapters fetched before. A folder counts
only when its digest is the one asked for. Big folders are hashed once: the digest is remembered under a stamp of sizes and
times, so that a changed file is read again. It downloads nothing itself; registry artifacts are `resolution`'s.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from engine.model_folder import is_gguf
from workbench.settings import data_dir
from workbench.versions.adapter import adapter_digest, is_adapter
from workbench.versions.digest import folder_digest, identity_files
from workbench.versions.errors import AdapterError, MissingWeightsError

if TYPE_CHECKING:
    from workbench.settings import Settings

_REMEMBERED_FROM_BYTES = 64 * 2**20  # below, hashing costs less than 0.1 s


def is_model(folder: Path) -> bool:
    """Whether the folder, or GGUF file, looks like a whole model."""
    return (folder / "config.json").is_file() or is_gguf(folder)


def digest_of(folder: Path, settings: Settings) -> str:
    """The digest of a model folder or an adapter folder, from its contents."""
    if is_adapter(folder) and not is_model(folder):
        return adapter_digest(folder)
    stats = [(file.name, file.stat()) for file in identity_files(folder)]
    if sum(stat.st_size for _, stat in stats) < _REMEMBERED_FROM_BYTES:
        return folder_digest(folder)
    stamp = [[name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for name, s in stats]
    place = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]
    note = settings.home_dir / "cache" / "digests" / f"{place}.json"
    known = _read_note(note)
    if known.get("stamp") == stamp:
        return str(known["digest"])
    digest = folder_digest(folder)
    _write_note(note, {"folder": str(folder), "stamp": stamp, "digest": digest})
    return digest


def find_weights(digest: str, settings: Settings, *, what: str, hints: Iterable[str] = ()) -> Path:
    """The folder whose contents have that digest.

    Raises:
        MissingWeightsError: naming the digest, where it was last, and what is there now.
    """
    hints = [hint for hint in hints if hint]
    seen: dict[str, str] = {}
    for folder in _candidates(hints, settings):
        try:
            found = digest_of(folder, settings)
        except (OSError, AdapterError):
            continue
        if found == digest:
            return folder
        seen[str(folder)] = found
    changed = [f"{hint} now holds {seen[hint]}" for hint in hints if hint in seen]
    place = changed[0] if changed else f"last seen at {hints[0]}" if hints else "its place was never known"
    raise MissingWeightsError(
        f"no folder here holds the weights {digest} of {what} ({place})", value=digest, limit=hints, param="model",
        remedy=f"Put the folder under {settings.home_dir / 'models'}, or back to where it was; its name does not matter.",
    )  # fmt: skip


def adapter_cache(settings: Settings, digest: str) -> Path:
    """Where an adapter that was fetched from the registry is kept."""
    return settings.home_dir / "cache" / "adapters" / digest


def merged_cache(settings: Settings, digest: str) -> Path:
    """Where base + adapter of that digest is kept."""
    return settings.home_dir / "cache" / "merged" / digest


def _candidates(hints: Iterable[str], settings: Settings) -> Iterator[Path]:
    done: set[Path] = set()
    roots = (data_dir() / "models", settings.home_dir / "models", settings.home_dir / "cache" / "adapters")
    below = (folder for root in roots for pattern in ("*", "*/*") for folder in sorted(root.glob(pattern)))
    for folder in (*map(Path, hints), *below):
        try:
            place = folder.resolve()
            usable = place not in done and (is_model(folder) or (folder.is_dir() and is_adapter(folder)))
        except OSError:
            continue
        done.add(place)
        if usable:
            yield folder


def _read_note(path: Path) -> dict[str, object]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _write_note(path: Path, value: dict[str, object]) -> None:
    """A note that cannot be written costs time, not correctness."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".note-")
        with os.fdopen(handle, "w", encoding="utf-8") as opened:
            json.dump(value, opened)
        os.replace(temporary, path)
    except OSError:
        return
