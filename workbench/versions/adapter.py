"""A LoRA adapter on disk: the two files that PEFT reads, beside them what we know of its making.

`adapter_model.safetensors` and `adapter_config.json` are the adapter and make its digest. The safetensors metadata names
the base by digest, so that an adapter cannot be put on other weights by accident. `quire.json` (recipe, figures) and the
card are about the adapter, not part of it. No torch: it reads headers, writing is `lora.save_adapter`.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.versions.errors import AdapterError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
LINEAGE_NAME = "quire.json"
CARD_NAME = "README.md"
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_AGAIN = "Train or download the adapter again."


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter as its files describe it. `base_digest` is empty when it was made elsewhere and does not say."""

    folder: Path
    digest: str
    base_digest: str
    rank: int
    alpha: float
    targets: tuple[str, ...]
    dtype: str
    size_bytes: int


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter's config."""
    return (folder / CONFIG_NAME).is_file()


def adapter_digest(folder: Path) -> str:
    """SHA-256 over the adapter's two files. Raises AdapterError when one is missing."""
    total = hashlib.sha256()
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        try:
            with (folder / name).open("rb") as opened:
                content = hashlib.file_digest(opened, "sha256").hexdigest()
        except OSError as error:
            raise AdapterError(
                f"{folder} holds no readable {name}", value=str(folder), limit=[CONFIG_NAME, WEIGHTS_NAME],
                param="adapter", remedy=_AGAIN,
            ) from error  # fmt: skip
        total.update(f"{name}\0{content}\n".encode())
    return total.hexdigest()


def read_adapter(folder: Path) -> Adapter:
    """What the adapter's files say.

    Raises:
        AdapterError: a file is missing or unreadable, or it is a kind of adapter that is not served here.
    """
    digest = adapter_digest(folder)
    config = _read_config(folder)
    header = _read_header(folder / WEIGHTS_NAME)
    metadata = header.pop("__metadata__", {})
    try:
        return Adapter(
            folder=folder,
            digest=digest,
            base_digest=str(metadata.get("base_digest", "")),
            rank=int(config["r"]),
            alpha=float(config["lora_alpha"]),
            targets=tuple(config["target_modules"]),
            dtype=str(next(iter(header.values()))["dtype"]),
            size_bytes=(folder / WEIGHTS_NAME).stat().st_size,
        )
    except (KeyError, TypeError, ValueError, StopIteration) as error:
        raise AdapterError(
            f"{folder / CONFIG_NAME} lacks r, lora_alpha or target_modules, or the adapter has no tensors",
            value=str(folder), param="adapter", remedy=_AGAIN,
        ) from error  # fmt: skip


def read_lineage(folder: Path) -> dict[str, Any]:
    """The recipe and figures beside the adapter; empty where there are none."""
    try:
        value = json.loads((folder / LINEAGE_NAME).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


_UNSUPPORTED: dict[str, Any] = {
    "use_dora": False, "bias": "none", "fan_in_fan_out": False, "modules_to_save": None,
}  # fmt: skip
"""Features of PEFT adapters that nothing here computes, and the values that mean "not used"."""
_UNMERGED: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
"""Those that engines compute and merging here does not."""


def check_mergeable(folder: Path) -> None:
    """Raises AdapterError when the adapter can be served over its base, but not merged into it here."""
    _refuse(folder / CONFIG_NAME, _read_config(folder), _UNMERGED)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} is not JSON", value=str(path), param="adapter", remedy=_AGAIN) from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise AdapterError(
            f"{path} describes no LoRA adapter", value=str(path), limit="peft_type LORA", param="adapter",
            remedy="Name a LoRA adapter.",
        )  # fmt: skip
    _refuse(path, config, _UNSUPPORTED)
    return config


def _refuse(path: Path, config: dict[str, Any], features: dict[str, Any]) -> None:
    for name, unused in features.items():
        if config.get(name, unused) not in (unused, None, [], {}):
            raise AdapterError(
                f"{path}: {name}={config[name]!r} is not supported", value=config[name], limit=unused, param="adapter",
                remedy="Merge it with the library that made it, and register the merged folder.",
            )  # fmt: skip


def _read_header(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > _MAX_HEADER_BYTES:
                raise ValueError(f"a header of {length} bytes")
            header: dict[str, Any] = json.loads(opened.read(length))
        needed = (
            8
            + length
            + max((t["data_offsets"][1] for n, t in header.items() if n != "__metadata__"), default=0)
        )
        if path.stat().st_size != needed:
            raise ValueError(f"{path.stat().st_size} bytes, its header says {needed}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
        raise AdapterError(
            f"{path} is not a whole safetensors file ({error})",
            value=str(path),
            param="adapter",
            remedy=_AGAIN,
        ) from error
    return header
