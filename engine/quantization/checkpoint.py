"""CheckpointQuantization: which linear layers of a checkpoint are quantized, and how each of them is stored.

Boundary: plain numbers and names, as a config.json's `quantization_config` says them; no tensors. Reading that entry is each
scheme's own business (``engine.quantization.awq`` and its neighbours).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import UnsupportedModelError

GROUP = 128  # inputs that share a scale in our own int4: ``engine.kernels.quantized_weight.GROUP``
ROW = -1  # `group_size` of one scale for a whole row of the weight


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearFormat:
    """How one linear layer's weight [out, in] is stored. `scheme` names the module that reads it."""

    scheme: str  # "awq", "gptq", "gptq_v2", "pack-quantized", "int-quantized", "float-quantized", "fp8"
    bits: int
    group_size: int = ROW  # inputs that share a scale
    block_rows: int = (
        1  # outputs that share it: more than 1 in blocks; 0: all of them, one scale for the tensor
    )
    symmetric: bool = True  # no zero points in the file
    dynamic_inputs: bool = False  # its products round what they multiply to fp8, row by row as it comes

    @property
    def held_form(self) -> str | None:
        """Which of our own forms ("int4", "int8", "fp8") holds such a weight on a GPU, as far as its config tells; None: none.

        Groups out of order, which only a file tells of, do not fit.
        """
        if self.scheme in ("fp8", "float-quantized"):
            by_row = self.group_size == ROW and self.block_rows in (0, 1)
            return "fp8" if by_row and self.dynamic_inputs else None
        if (
            self.bits <= 4
            and self.block_rows == 1
            and (self.group_size == ROW or self.group_size % GROUP == 0)
        ):
            return "int4"
        return "int8" if self.group_size == ROW and self.symmetric else None


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointQuantization:
    """The formats of a checkpoint's linear layers. The first group whose targets match a layer's name counts.

    Targets and `ignored` are names of modules: "re:" begins a regular expression, "Linear" stands for every linear layer.
    """

    method: str  # `quant_method` of the config
    groups: tuple[tuple[tuple[str, ...], LinearFormat], ...]
    ignored: tuple[str, ...] = ()

    def format_of(self, name: str) -> LinearFormat | None:
        """How the linear layer of this name (``model.layers.0.mlp.down_proj``) is stored; None: as floats."""
        if any(_matches(name, pattern) for pattern in self.ignored):
            return None
        for targets, found in self.groups:
            if any(target == "Linear" or _matches(name, target) for target in targets):
                return found
        return None


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern names this module or one that it lies in."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return re.search(rf"(?:^|\.){re.escape(pattern)}(?:\.|$)", name) is not None


def require(
    values: Mapping[str, Any], key: str, allowed: tuple[Any, ...], *, default: Any = None, method: str
) -> Any:
    """An entry of a `quantization_config` that must be one of `allowed`.

    Raises:
        UnsupportedModelError: naming method, entry, value and what is supported.
    """
    value = values.get(key, default)
    if value not in allowed:
        shown = ", ".join(map(str, allowed))
        raise UnsupportedModelError(
            f"{method} checkpoints with {key} {value!r} are not supported",
            value=value,
            limit=list(allowed),
            param=f"quantization_config.{key}",
            remedy=f"Supported: {shown}. Or use the unquantized checkpoint of the model.",
        )
    return value


def group_size_of(values: Mapping[str, Any], *, method: str, default: int = 128) -> int:
    """`group_size` of a `quantization_config`: a positive number, or `ROW`.

    Raises:
        UnsupportedModelError: anything else.
    """
    size = values.get("group_size", default)
    if not isinstance(size, int) or isinstance(size, bool) or (size < 1 and size != ROW):
        raise UnsupportedModelError(
            f"{method} checkpoints with group_size {size!r} are not supported",
            value=size,
            limit="a positive integer or -1",
            param="quantization_config.group_size",
        )
    return size
