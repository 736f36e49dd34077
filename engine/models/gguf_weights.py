"""Fill a decoder from a GGUF file: each tensor is dequantized by the gguf package, some rows at a time, into its place.

Strict as ``engine.models.weights``: every parameter is filled once, shapes must agree, what has no place is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.errors import CorruptWeightsError, UnsupportedModelError
from engine.models.decoder import Decoder
from engine.quantization.gguf import PAIRED, ROPE_FACTORS, checkpoint_name
from engine.quantization.gguf_file import GgufFile, GgufTensor

PIECE_VALUES = 1 << 22  # dequantized at once: 16 MiB of float32, and a few times that on the way


def load_gguf(decoder: Decoder, path: Path, progress: Callable[[str, float], None] | None = None) -> None:
    """Fill every parameter of the decoder from the file, converting to the decoder's dtype.

    Raises:
        UnsupportedModelError: a tensor without a place, or of a type that is not dequantized.
        CorruptWeightsError: a damaged file, a wrong shape, a missing tensor.
    """
    file = GgufFile.read(path)
    targets = dict(decoder.weight_targets())
    is_paired = file.metadata.get("general.architecture") in PAIRED
    for index, tensor in enumerate(file.tensors.values()):
        name = checkpoint_name(tensor.name)
        if tensor.name == ROPE_FACTORS:
            continue  # the config has read them
        target = targets.pop(name, None)
        if target is None:
            raise UnsupportedModelError(
                f"{path.name} holds {tensor.name}, which the decoder of this architecture does not have",
                value=tensor.name, param="model", remedy="Use the model's own checkpoint with *.safetensors.",
            )  # fmt: skip
        if tensor.shape != tuple(target.shape):
            raise CorruptWeightsError(
                f"{path.name}: {tensor.name} has shape {tensor.shape}, its metadata asks for {tuple(target.shape)}",
                value=tensor.shape, limit=tuple(target.shape), param="model", remedy="Convert the model again.",
            )  # fmt: skip
        _fill(target, file, tensor, decoder.config.head_size if is_paired and _is_rotated(name) else 1)
        if progress is not None:
            progress(f"loading {path.name}", (index + 1) / len(file.tensors))
    if targets:
        raise CorruptWeightsError(
            f"{path}: {len(targets)} tensors are not in the file, the first is {min(targets)}",
            value=sorted(targets), param="model", remedy="Download the file again, or convert the model again.",
        )  # fmt: skip


def _is_rotated(name: str) -> bool:
    return ".self_attn.q_proj." in name or ".self_attn.k_proj." in name


def _fill(target: Tensor, file: GgufFile, tensor: GgufTensor, head_size: int) -> None:
    """Copy a tensor, as rows; `head_size` above 1: rows of each head go from neighbouring rotary pairs to halves."""
    width = tensor.shape[-1] if len(tensor.shape) > 1 else 1
    num_rows = max(1, PIECE_VALUES // width // head_size) * head_size
    first = 0
    for piece in _rows(file, tensor, num_rows):
        values = torch.from_numpy(piece)
        if head_size > 1:
            pairs = values.view(-1, head_size // 2, 2, *values.shape[1:])
            values = pairs.transpose(1, 2).reshape(values.shape)
        target[first : first + len(values)].copy_(values)
        first += len(values)


def _rows(file: GgufFile, tensor: GgufTensor, num_rows: int) -> Iterator[Any]:
    """The tensor's values in float32, so many rows at a time."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    rows = tensor.shape[0]
    kind = GGMLQuantizationType(tensor.type_id)
    raw = np.memmap(file.path, np.uint8, "r", tensor.offset, (rows, tensor.num_bytes // rows))
    is_float = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}.get(kind)
    for first in range(0, rows, num_rows):
        piece = np.ascontiguousarray(raw[first : first + num_rows])
        try:
            values = dequantize(piece if is_float is None else piece.view(is_float), kind)
        except NotImplementedError as error:
            raise UnsupportedModelError(
                f"{file.path.name}: {tensor.name} is stored as {kind.name}, which is not dequantized here",
                value=kind.name, param="model", remedy="Use a file of F16, BF16, Q8_0, Q4_0 … Q6_K.",
            ) from error  # fmt: skip
        yield np.array(values.reshape(len(piece), *tensor.shape[1:]), dtype=np.float32, copy=True)
