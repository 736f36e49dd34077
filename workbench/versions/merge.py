"""Base + adapter = a model folder that any engine loads, with a digest that is known before it is made.

The sum is computed in fp64 and rounded once to the base's dtype, so that the result hardly depends on the machine. The folder
is written beside its place and renamed into it: readers see all of it or nothing. It does not choose the base
(`weights.py` finds it by digest).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.versions.adapter import WEIGHTS_NAME, Adapter, check_mergeable, read_adapter
from workbench.versions.digest import NOT_IDENTITY, folder_digest
from workbench.versions.errors import AdapterError, WriteError, WrongBaseError

if TYPE_CHECKING:
    import torch

MARKER = "merged_from"
"""In every merged folder: what it was made of, and the digest of what came out. No suffix: it is not part of that digest."""
_COPIED = ("*.json", "*.jinja", "*.model", "*.txt")


def merged_digest(base_digest: str, adapter_digest: str) -> str:
    """The content identity of base + adapter: a function of what it is made of, so known without making it."""
    return hashlib.sha256(f"merged/1\0{base_digest}\0{adapter_digest}".encode()).hexdigest()


def check_base(adapter: Adapter, base_digest: str) -> None:
    """Raises WrongBaseError when the adapter says that it belongs to another base."""
    if adapter.base_digest and adapter.base_digest != base_digest:
        raise WrongBaseError(
            f"the adapter {adapter.digest[:12]} was trained on base {adapter.base_digest}, not on {base_digest}",
            value=base_digest, limit=adapter.base_digest, param="base",
            remedy="Give the base that it was trained on, or train it again on this one.",
        )  # fmt: skip


def is_merged(folder: Path) -> bool:
    """Whether the folder holds, whole and unchanged, what was merged into it."""
    try:
        made = json.loads((folder / MARKER).read_text("utf-8"))
        return bool(made["digest"] == folder_digest(folder))
    except (OSError, ValueError, LookupError, TypeError):
        return False


def merge(base_folder: Path, adapter_folder: Path, target: Path) -> Path:
    """Writes base + adapter to `target` (atomically; what is there already is kept if it is intact) and returns it.

    Raises:
        AdapterError: the adapter cannot be read, or does not fit the base's layers.
        WrongBaseError: it names another base.
        WriteError: the target cannot be written.
    """
    from safetensors import SafetensorError

    if is_merged(target):
        return target
    adapter = read_adapter(adapter_folder)
    check_mergeable(adapter_folder)
    base_digest = folder_digest(base_folder)
    check_base(adapter, base_digest)
    staging: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=".merging-"))
        _write(base_folder, adapter, staging)
        made = {"base": base_digest, "adapter": adapter.digest, "digest": folder_digest(staging)}
        (staging / MARKER).write_text(json.dumps(made) + "\n", encoding="utf-8")
        _sync(staging)
        _move(staging, target)
    except (OSError, SafetensorError) as error:  # the second: what the library makes of a write that fails
        raise WriteError(
            f"the merged weights cannot be written to {target}: {error}", value=str(target), param="HOME_DIR",
            remedy="Free some space, or set HOME_DIR to a folder that can be written.",
        ) from error  # fmt: skip
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
    return target


def _move(staging: Path, target: Path) -> None:
    """Whoever is second keeps the first one's folder; a damaged one is taken out of the way."""
    try:
        os.rename(staging, target)
    except OSError:
        if is_merged(target):
            return
        aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=".damaged-"))
        os.rename(target, aside / target.name)
        os.rename(staging, target)
        shutil.rmtree(aside, ignore_errors=True)


def _write(base: Path, adapter: Adapter, staging: Path) -> None:
    from safetensors.torch import load_file, save_file

    _refuse_quantized(base)
    for pattern in _COPIED:
        for file in sorted(base.glob(pattern)):
            if file.name not in NOT_IDENTITY:
                shutil.copyfile(file, staging / file.name)
    updates = load_file(adapter.folder / WEIGHTS_NAME)
    used: set[str] = set()
    for file in sorted(base.glob("*.safetensors")):
        tensors = load_file(file)
        for name in list(tensors):
            tensors[name] = _merged(name, tensors[name], updates, adapter.alpha / adapter.rank, used)
        save_file(tensors, staging / file.name, metadata={"format": "pt"})
    left = sorted(updates.keys() - used)
    if left or not used:
        raise AdapterError(
            f"the base has no layer for {len(left)} of the adapter's tensors, the first is {left[0] if left else '-'}",
            value=left, param="adapter", remedy="Give the base that the adapter was trained on.",
        )  # fmt: skip


def _refuse_quantized(base: Path) -> None:
    """An update cannot be added to weights that are stored as integers or fp8, which such a base may hold under plain names."""
    stored: str | None = "GGUF"
    if not base.is_file():
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
        stored = (config.get("quantization_config") or {}).get("quant_method")
    if stored:
        raise AdapterError(
            f"the base {base.name} is stored as {stored}: an adapter cannot be merged into it", value=stored,
            param="adapter", remedy="Give the unquantized base that the adapter was trained on.",
        )  # fmt: skip


def _merged(
    name: str, weight: torch.Tensor, updates: dict[str, torch.Tensor], scale: float, used: set[str]
) -> torch.Tensor:
    stem = f"base_model.model.{name.removesuffix('.weight')}"
    a_name, b_name = f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"
    if a_name not in updates or b_name not in updates:
        return weight
    a, b = updates[a_name].double(), updates[b_name].double()
    if (b.shape[0], a.shape[1]) != tuple(weight.shape) or a.shape[0] != b.shape[1]:
        raise AdapterError(
            f"{name} is {tuple(weight.shape)}, the adapter's update is {(b.shape[0], a.shape[1])}",
            value=(b.shape[0], a.shape[1]), limit=tuple(weight.shape), param="adapter",
            remedy="Give the base that the adapter was trained on.",
        )  # fmt: skip
    used.update((a_name, b_name))
    return (weight.double() + scale * (b @ a)).to(weight.dtype)


def _sync(folder: Path) -> None:
    folder.chmod(0o755)
    for file in folder.iterdir():
        file.chmod(0o644)
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
