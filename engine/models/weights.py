"""Fill a decoder from safetensors files: one file, or shards with an index.

Each tensor is copied from the mapped file into its place in the merged parameter, so that the weights exist once. Strict: every parameter is filled exactly once, shapes must agree, and a tensor that the decoder has no place for is
an error, because it would be a part of the model that is not computed.

Boundary: no pickle formats, no download. Quantized checkpoints: ``engine.models.stored_linears``; GGUF: ``gguf_weights``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.errors import CorruptWeightsError, ModelNotFoundError, UnsupportedModelError
from engine.model_folder import is_gguf
from engine.models.decoder import Decoder
from engine.models.gguf_weights import load_gguf
from engine.models.shard import Split
from engine.models.stored_linears import StoredLinears
from engine.models.weight_copies import WeightCopies

Progress = Callable[[str, float], None]
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
AGAIN = "Download the file again, or point to an intact copy of the model."


class WeightedDecoder(Protocol):
    """What the loader asks of a decoder."""

    @property
    def embedding(self) -> Tensor:
        """The input embedding; all weights are on its device."""
        ...

    def weight_targets(self) -> Iterator[tuple[str, Tensor]]:
        """Names, each with the memory that the tensor of this name fills."""
        ...

    def place_of(self, stored: str) -> str | None:
        """The target's name for a checkpoint's; None where the tensor is not part of the model."""
        ...

    def finish_loading(self) -> None:
        """What has to be done once all weights are there."""
        ...


def load_weights(decoder: WeightedDecoder, folder: Path | str, progress: Progress | None = None) -> None:
    """Fill every parameter of the decoder from the folder's safetensors or a GGUF file, converting to the decoder's dtype.

    `progress` gets a message and the share of tensors whose copy was started, in [0, 1].

    Raises:
        ModelNotFoundError: the folder holds no weights.
        UnsupportedModelError: only pickled weights, or tensors that the decoder has no place for.
        CorruptWeightsError: missing shard, truncated file, wrong shape, missing or doubled tensor.
    """
    if is_gguf(Path(folder)):
        assert isinstance(decoder, Decoder), "GGUF files have native architectures"
        load_gguf(decoder, Path(folder), progress)
        return
    targets = dict(decoder.weight_targets())
    stored = StoredLinears(decoder, targets) if isinstance(decoder, Decoder) else None
    splits = decoder.splits() if isinstance(decoder, Decoder) else {}
    if stored is not None:
        targets = {name: target for name, target in targets.items() if name not in stored.names}
    filled: dict[str, Path] = {}
    files = weight_files(Path(folder))
    with WeightCopies(decoder.embedding.device) as copies:
        for path in files:
            _load_file(path, decoder, targets, splits, stored, filled, copies, progress)
    missing = sorted((targets.keys() - filled.keys()) | set(stored.missing() if stored is not None else ()))
    if missing:
        raise CorruptWeightsError(
            f"{folder}: {len(missing)} of {len(targets)} tensors are in no weight file, the first is {missing[0]}",
            value=missing,
            param="model",
            remedy="Check that config.json and the weight files belong together. " + AGAIN,
        )
    if stored is not None:
        stored.fill(
            lambda share: progress("unpacking quantized weights", share) if progress is not None else None
        )
    decoder.finish_loading()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, all of them present.

    Raises:
        ModelNotFoundError, UnsupportedModelError, CorruptWeightsError: as `load_weights`.
    """
    index = folder / INDEX_NAME
    if index.is_file():
        files = [folder / name for name in _shard_names(index)]
    elif (folder / SINGLE_NAME).is_file():
        files = [folder / SINGLE_NAME]
    else:
        files = sorted(folder.glob("*.safetensors"))[:1]
    if not files:
        _raise_no_weights(folder)
    for path in files:
        if not path.is_file():
            raise CorruptWeightsError(
                f"weight shard {path.name} is missing from {folder}",
                value=str(path),
                param="model",
                remedy=f"{INDEX_NAME} lists {len(files)} shards. " + AGAIN,
            )
    return files


def _shard_names(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CorruptWeightsError(
            f"{index} is not a safetensors index ({error})", value=str(index), param="model", remedy=AGAIN
        ) from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CorruptWeightsError(
                f"{index} names a shard outside the model's folder: {name!r}",
                value=name,
                param="model",
                remedy=AGAIN,
            )
    return names


def _raise_no_weights(folder: Path) -> None:
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if pickled:
        raise UnsupportedModelError(
            f"{folder} has only pickled weights ({pickled[0]})",
            value=pickled,
            limit=["*.safetensors"],
            param="model",
            remedy="Convert them: load the model with transformers and save_pretrained(safe_serialization=True).",
        )
    raise ModelNotFoundError(
        f"no *.safetensors in {folder}",
        value=str(folder),
        param="model",
        remedy="Download the model's weights.",
    )


def _load_file(
    path: Path,
    decoder: WeightedDecoder,
    targets: dict[str, Tensor],
    splits: dict[str, Split],
    linears: StoredLinears | None,
    filled: dict[str, Path],
    copies: WeightCopies,
    progress: Progress | None,
) -> None:
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            for stored in file.keys():  # noqa: SIM118 - not a dict
                name = decoder.place_of(stored)
                if name is None:
                    continue
                if linears is not None and linears.take(name, partial(file.get_tensor, stored)):
                    continue
                _check_place(path, name, targets, filled)
                source, split = file.get_tensor(stored), splits.get(name)
                held = targets[name].shape
                _check_values(path, name, source, held if split is None else split.stored_shape(held))
                copies.copy(source if split is None else split.part(source), targets[name])
                filled[name] = path
                if progress is not None:
                    progress(f"loading {path.name}", len(filled) / len(targets))
    except (SafetensorError, OSError) as error:
        raise CorruptWeightsError(
            f"{path} cannot be read as safetensors ({error}); it has {path.stat().st_size} bytes",
            value=str(path),
            param="model",
            remedy="The file is truncated or damaged. " + AGAIN,
        ) from error


def _check_place(path: Path, name: str, targets: Iterable[str], filled: dict[str, Path]) -> None:
    if name not in targets:
        raise UnsupportedModelError(
            f"{path.name} holds {name}, which the decoder of this architecture does not have",
            value=name,
            param="model",
            remedy="Check that config.json belongs to these weights.",
        )
    if name in filled:
        raise CorruptWeightsError(
            f"{name} is in {filled[name].name} and again in {path.name}",
            value=name,
            param="model",
            remedy=AGAIN,
        )


def _check_values(path: Path, name: str, source: Tensor, shape: torch.Size) -> None:
    if source.shape != shape:
        raise CorruptWeightsError(
            f"{path.name}: {name} has shape {tuple(source.shape)}, config.json asks for {tuple(shape)}",
            value=tuple(source.shape),
            limit=tuple(shape),
            param="model",
            remedy="Check that config.json and the weight files belong together.",
        )
    if not source.is_floating_point():
        raise UnsupportedModelError(
            f"{path.name}: {name} has dtype {source.dtype}; config.json says that it holds floats",
            value=str(source.dtype),
            param="model",
            remedy="Use the config.json that belongs to the checkpoint: it names how its weights are quantized.",
        )
