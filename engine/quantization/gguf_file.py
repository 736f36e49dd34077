"""GgufFile: what the header of a GGUF file says: its metadata, and where each tensor's bytes are.

Read with the standard library, without the vocabulary (hundreds of thousands of texts that only a tokenizer needs), so that a
model's shape is known in milliseconds. Boundary: no tensor data; ``engine.models.gguf_weights`` reads that.
Source: the format's specification, version 3 (ggml, ``docs/gguf.md``).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from engine.errors import CorruptWeightsError, UnsupportedModelError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_ALIGNMENT = 32
_MAX_COUNT = 1 << 24  # of entries, tensors, bytes of a name: beyond this a header is garbage
_MAX_KEPT = 4096  # values of an array that are kept; of a longer one its length


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor: shape as torch has it, and the bytes `offset` … `offset + num_bytes` of the file."""

    name: str
    shape: tuple[int, ...]
    type_id: int  # of ggml: 0 float32, 1 float16, 2 Q4_0, …
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A GGUF file's header. An array of more than a few thousand values is in `metadata` as its length."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @classmethod
    def read(cls, path: Path) -> GgufFile:
        """Read the header and check that the file holds what it says.

        Raises:
            CorruptWeightsError: no GGUF file, or one that ends early.
            UnsupportedModelError: another version, a split file, or a tensor of an unknown type.
        """
        try:
            with path.open("rb") as file:
                return _Reader(path, file).read()
        except (struct.error, UnicodeDecodeError, OverflowError, OSError) as error:
            raise _corrupt(path, f"its header cannot be read ({error})") from error


class _Reader:
    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file

    def read(self) -> GgufFile:
        if self._file.read(4) != b"GGUF":
            raise _corrupt(self._path, "it does not begin with GGUF")
        version = self._scalar("I")
        if version not in _VERSIONS:
            raise UnsupportedModelError(
                f"{self._path.name} is a GGUF file of version {version}", value=version, limit=_VERSIONS, param="model",
                remedy="Convert it again with a newer llama.cpp; big-endian files are not read.",
            )  # fmt: skip
        num_tensors, num_entries = self._count(), self._count()
        metadata = {self._text(): self._value(self._scalar("I")) for _ in range(num_entries)}
        if int(metadata.get("split.count", 0)) > 1:
            raise UnsupportedModelError(
                f"{self._path.name} is one of {metadata['split.count']} parts", value=metadata["split.count"], limit=1,
                param="model", remedy="Join them: llama-gguf-split --merge FIRST_PART OUTPUT.",
            )  # fmt: skip
        infos = [self._tensor() for _ in range(num_tensors)]
        alignment = int(metadata.get("general.alignment", _ALIGNMENT))
        start = -(-self._file.tell() // alignment) * alignment
        tensors = {info.name: GgufTensor(info.name, info.shape, info.type_id, start + info.offset, info.num_bytes)
                   for info in infos}  # fmt: skip
        size, needed = (
            self._path.stat().st_size,
            max((t.offset + t.num_bytes for t in tensors.values()), default=0),
        )
        if size < needed:
            raise _corrupt(self._path, f"it has {size} bytes and should have {needed}")
        return GgufFile(self._path, metadata, tensors)

    def _tensor(self) -> GgufTensor:
        name = self._text()
        shape = tuple(reversed([self._scalar("Q") for _ in range(self._count("I"))]))
        type_id, offset = self._scalar("I"), self._scalar("Q")
        return GgufTensor(name, shape, type_id, offset, tensor_bytes(self._path, name, type_id, shape))

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            return self._scalar(self._format(kind))
        kind, length = self._scalar("I"), self._count()
        if length <= _MAX_KEPT:
            return [self._value(kind) for _ in range(length)]
        if kind != _STRING:
            self._file.seek(length * struct.calcsize("<" + self._format(kind)), 1)
        else:
            for _ in range(length):
                self._file.seek(self._count(), 1)
        return length

    def _format(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise _corrupt(self._path, f"its header has a value of kind {kind}")
        return _SCALARS[kind]

    def _scalar(self, code: str) -> Any:
        size = struct.calcsize("<" + code)
        return struct.unpack("<" + code, self._file.read(size))[0]

    def _count(self, code: str = "Q") -> int:
        count = int(self._scalar(code))
        if count > _MAX_COUNT:
            raise _corrupt(self._path, f"its header counts {count}")
        return count

    def _text(self) -> str:
        length = self._count()
        raw = self._file.read(length)
        if len(raw) < length:
            raise _corrupt(self._path, "it ends within its header")
        return raw.decode("utf-8")


def tensor_bytes(path: Path, name: str, type_id: int, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor's data: whole blocks of its type in each row.

    Raises:
        UnsupportedModelError: a type that the gguf package does not know.
        CorruptWeightsError: rows that are no whole number of blocks.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        size, num_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(type_id)]
    except (ValueError, KeyError) as error:
        raise UnsupportedModelError(
            f"{path.name}: {name} has the unknown ggml type {type_id}", value=type_id, param="model",
            remedy="Update the gguf package, or convert the model again.",
        ) from error  # fmt: skip
    if not shape or shape[-1] % size:
        raise _corrupt(path, f"{name} of shape {shape} is no whole number of blocks of {size}")
    return math.prod(shape) // int(size) * int(num_bytes)


def _corrupt(path: Path, reason: str) -> CorruptWeightsError:
    return CorruptWeightsError(
        f"{path} cannot be read as GGUF: {reason}", value=str(path), param="model",
        remedy="The file is truncated or damaged. Download it again, or point to an intact copy.",
    )  # fmt: skip
