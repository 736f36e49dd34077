"""Find a model's files: a folder or GGUF file as it is, or a hub id downloaded into the hub's own cache.

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
    """The folder that holds the model's files, or the GGUF file that is the model.

    Raises:
        ModelNotFoundError: no such folder, and not a hub id that can be downloaded; or a folder of several GGUF files.
    """
    folder = Path(name).expanduser()
    if is_gguf(folder):
        return folder
    if folder.is_dir():
        return _only_gguf(folder) or folder
    if not _HUB_ID.fullmatch(name):
        raise ModelNotFoundError(
            f"no model folder {name}",
            value=name,
            param="model",
            remedy="Name a folder that holds config.json and *.safetensors, a *.gguf file, or a hub id like org/name.",
        )
    return _download(name, _FILES)


def _download(name: str, patterns: list[str]) -> Path:
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub client raises its own, requests' and the socket's errors
        raise ModelNotFoundError(
            f"{name} is no folder here and could not be downloaded ({type(error).__name__}: {error})",
            value=name,
            param="model",
            remedy="Check the name and the network, or name a local folder.",
        ) from error


def find_config(name: str) -> Path:
    """The folder or GGUF file that holds the model's config; of a hub id only its config.json is downloaded.

    Raises:
        ModelNotFoundError: as `find_model`.
    """
    if Path(name).expanduser().exists() or not _HUB_ID.fullmatch(name):
        return find_model(name)
    return _download(name, ["config.json"])


def is_gguf(path: Path) -> bool:
    """Whether the path is a GGUF file, which holds config, tokenizer and weights."""
    return path.suffix == ".gguf" and path.is_file()


def _only_gguf(folder: Path) -> Path | None:
    """The GGUF file of a folder that holds no other model; None where there is none.

    Raises:
        ModelNotFoundError: several, of which none is the obvious one.
    """
    files = sorted(folder.glob("*.gguf"))
    if not files or (folder / "config.json").is_file():
        return None
    if len(files) > 1:
        raise ModelNotFoundError(
            f"{folder} holds {len(files)} GGUF files: {', '.join(file.name for file in files)}",
            value=str(folder), limit=[str(file) for file in files], param="model", remedy=f"Name one of them: {files[0]}",
        )  # fmt: skip
    return files[0]


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
    """Whether the folder or GGUF file holds a tokenizer (a model of random weights may have none)."""
    if is_gguf(folder):
        from engine.quantization.gguf_file import GgufFile

        return "tokenizer.ggml.tokens" in GgufFile.read(folder).metadata
    return any(
        (folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    )
