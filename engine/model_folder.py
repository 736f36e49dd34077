"""Find a model's files: a folder as it is, or a hub id downloaded into the hub's own cache.

Boundary: paths only, no torch. Registry addresses (``models:/name@alias``) are resolved above the engine.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from engine.errors import ModelNotFoundError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]


def find_model(name: str) -> Path:
    """The folder that holds the model's files.

    Raises:
        ModelNotFoundError: no such folder, and not a hub id that can be downloaded.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not _HUB_ID.fullmatch(name):
        raise ModelNotFoundError(
            f"no model folder {name}",
            value=name,
            param="model",
            remedy="Name a folder that holds config.json and *.safetensors, or a hub id like org/name.",
        )
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=_FILES))
    except Exception as error:  # the hub client raises its own, requests' and the socket's errors
        raise ModelNotFoundError(
            f"{name} is no folder here and could not be downloaded ({type(error).__name__}: {error})",
            value=name,
            param="model",
            remedy="Check the name and the network, or name a local folder.",
        ) from error


def generation_eos_ids(folder: Path) -> frozenset[int]:
    """End-of-sequence ids of generation_config.json; empty when there is none."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return frozenset()
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError):
        return frozenset()
    if value is None:
        return frozenset()
    return frozenset(int(v) for v in (value if isinstance(value, list) else [value]))


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds a tokenizer (a model of random weights may have none)."""
    return any(
        (folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    )
