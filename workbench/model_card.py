"""What a model folder says about itself: title, size, context, digest, what it was trained for, prompts to try.

Reads small files and safetensors headers; weights are read once, for the digest. No torch.
Does not check that the model can run: that is the engine's `build`.
"""

from __future__ import annotations

import json
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import CorruptWeightsError, ModelNotFoundError
from engine.model_folder import find_model, is_gguf
from engine.quantization.gguf_file import GgufFile
from workbench.settings import FAKE_MODEL, bundled_model
from workbench.versions.digest import folder_digest

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True, slots=True)
class PromptChip:
    """A task to try with one click, held out from training."""

    family: str
    title: str
    messages: tuple[dict[str, Any], ...]
    expected: str | None = None
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class ModelCard:
    """One loadable model as people and the API see it."""

    id: str
    title: str
    description: str
    is_demo: bool
    trained_for: str
    digest: str  # content identity (sha256, hex); "" when there are no files
    path: str
    context: int | None  # tokens of prompt and output
    num_parameters: int | None
    prompt_chips: tuple[PromptChip, ...] = ()
    stored_as: str = ""  # dtype or quantization of the checkpoint; "" where the files do not say


def read_model_card(path: str) -> ModelCard:
    """The card of a model folder, or of a hub id, of which nothing is known before it is loaded."""
    folder = Path(path)
    if path == FAKE_MODEL:
        return _FAKE_CARD
    if is_gguf(folder) or (folder.is_dir() and not (folder / "config.json").is_file()):
        found = find_model(path)
        if is_gguf(found):
            return _gguf_card(found)
    if not folder.is_dir():
        return ModelCard(path, path, f"Hub model {path}", False, "", "", path, None, None)
    config = _read_json(folder / "config.json")
    is_demo = folder.resolve() == bundled_model().resolve()
    num_parameters = _num_parameters(folder)
    size = f"{round(num_parameters / 1e6)} M" if num_parameters else "size unknown"
    return ModelCard(
        id=folder.resolve().name,
        title=f"{folder.resolve().name} (demo, {size})" if is_demo else f"{folder.resolve().name} ({size})",
        description=f"{config.get('model_type', 'unknown')} model, {size} parameters",
        is_demo=is_demo,
        trained_for=_DEMO_TRAINED_FOR if is_demo else "",
        digest=folder_digest(folder),
        path=str(folder),
        context=_positive_int(config.get("max_position_embeddings")),
        num_parameters=num_parameters,
        prompt_chips=_prompt_chips(folder / "prompt_chips.json"),
        stored_as=_stored_as(config),
    )


def _gguf_card(file: Path) -> ModelCard:
    """The card of a GGUF file, from its header. Its digest is of its whole content."""
    header = GgufFile.read(file)
    num_parameters = sum(math.prod(tensor.shape) for tensor in header.tensors.values())
    size, kind = f"{round(num_parameters / 1e6)} M", str(header.metadata.get("general.architecture"))
    return ModelCard(
        id=file.stem,
        title=f"{file.stem} ({size}, GGUF)",
        description=f"{kind} model in a GGUF file, {size} parameters",
        is_demo=False,
        trained_for="",
        digest=folder_digest(file),
        path=str(file),
        context=_positive_int(header.metadata.get(f"{kind}.context_length")),
        num_parameters=num_parameters or None,
        stored_as="gguf",
    )


_FAKE_CARD = ModelCard(
    id=FAKE_MODEL,
    title="fake-echo (no model)",
    description="Tokens that can be worked out by hand, from a runner without a model: for tests and work on pages",
    is_demo=True,
    trained_for="nothing: it is not a model",
    digest="",
    path="",
    context=None,
    num_parameters=None,
    prompt_chips=(PromptChip("echo", "Say hello", ({"role": "user", "content": "Hello there"},)),),
)
_DEMO_TRAINED_FOR = (
    "small verifiable tasks: copy, count, spell, call a tool and tell its result, answer from a given context. It often "
    "fails outside the shown examples (scores in its card) and knows nothing of the world beyond the prompt."
)


def check_model(path: str) -> None:
    """Refuse a model that its files already show to be unloadable, before any work. A hub id is taken on trust.

    Raises:
        ModelNotFoundError: no such folder, or one without config.json.
        CorruptWeightsError: a shard is missing, or shorter than its header says; so is a GGUF file.
    """
    folder = Path(path).expanduser()
    if is_gguf(folder):
        GgufFile.read(folder)
        return
    if not folder.is_dir():
        if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not path.startswith("."):
            return
        raise ModelNotFoundError(
            f"no model folder {path}", value=path, param="model",
            remedy="Name a folder that holds config.json and *.safetensors, a *.gguf file, or a hub id like org/name.",
        )  # fmt: skip
    if not (folder / "config.json").is_file():
        only = find_model(path)  # a folder of one GGUF file is that model
        if is_gguf(only):
            GgufFile.read(only)
            return
        raise ModelNotFoundError(
            f"{path} holds no config.json", value=path, limit="config.json and *.safetensors", param="model",
            remedy="Name the folder that the model was saved to.",
        )  # fmt: skip
    files = _weight_files(folder)
    if not files:
        raise CorruptWeightsError(
            f"{path} holds no *.safetensors file", value=path, limit="*.safetensors", param="model",
            remedy="Save the model with safe_serialization=True.",
        )  # fmt: skip
    for file in files:
        _check_weight_file(file)


def _weight_files(folder: Path) -> list[Path]:
    """The files that the index names, else all there are."""
    index = _read_json(folder / "model.safetensors.index.json")
    weight_map = index.get("weight_map")
    if isinstance(weight_map, dict):
        return [folder / name for name in sorted({str(name) for name in weight_map.values()})]
    return sorted(folder.glob("*.safetensors"))


def _check_weight_file(file: Path) -> None:
    try:
        header, header_bytes = _read_header(file)
        needed = header_bytes + max(
            (t["data_offsets"][1] for n, t in header.items() if n != "__metadata__"), default=0
        )
        size = file.stat().st_size
    except FileNotFoundError:
        raise CorruptWeightsError(
            f"weight file {file.name} is missing",
            value=str(file),
            param="model",
            remedy="Download the model again.",
        ) from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
        raise CorruptWeightsError(
            f"weight file {file.name} has no readable header ({type(error).__name__})", value=str(file), param="model",
            remedy="Download the model again.",
        ) from error  # fmt: skip
    if size != needed:
        raise CorruptWeightsError(
            f"weight file {file.name} has {size} bytes, its header says {needed}", value=size, limit=needed,
            param="model", remedy="Download the model again.",
        )  # fmt: skip


def _read_header(file: Path) -> tuple[dict[str, Any], int]:
    """The safetensors header, and the bytes before the data."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        if length > _MAX_HEADER_BYTES:
            raise ValueError(f"a header of {length} bytes")
        return json.loads(opened.read(length)), 8 + length


def _num_parameters(folder: Path) -> int | None:
    """Elements of all tensors, from the safetensors headers; None when one cannot be read."""
    total = 0
    for file in folder.glob("*.safetensors"):
        try:
            header, _ = _read_header(file)
        except (OSError, ValueError, struct.error):
            return None
        total += sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    return total or None


def _prompt_chips(file: Path) -> tuple[PromptChip, ...]:
    rows = _read_json(file).get("chips", ())
    return tuple(
        PromptChip(
            family=str(row.get("family", "")),
            title=str(row.get("label", "")),
            messages=tuple(row.get("messages", ())),
            expected=row.get("expected"),
            tools=tuple(row.get("tools", ())),
        )
        for row in rows
        if isinstance(row, dict)
    )


def _read_json(file: Path) -> dict[str, Any]:
    """The file's object, or an empty one: a card shows less when a file is missing, it does not fail."""
    try:
        value = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _stored_as(config: dict[str, Any]) -> str:
    quantization = config.get("quantization_config")
    named = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return str(named or config.get("dtype") or config.get("torch_dtype") or "")


def _positive_int(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None
