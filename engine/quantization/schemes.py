"""The schemes by name: which tensors make one linear layer's weight, and how they are read. The one seam to the loader.

Boundary: dispatch. Files and places of weights are ``engine.models.weights``'s and ``engine.models.stored_linears``'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor

from engine.errors import UnsupportedModelError
from engine.quantization import awq, compressed_tensors, fp8, gptq
from engine.quantization.checkpoint import CheckpointQuantization, LinearFormat
from engine.quantization.stored_weight import StoredWeight

READERS: Mapping[str, Callable[[Mapping[str, Any]], CheckpointQuantization]] = MappingProxyType(
    {each.METHOD: each.read_config for each in (awq, gptq, compressed_tensors, fp8)}
)


@dataclass(frozen=True, slots=True)
class Scheme:
    """One way to store a linear layer: the last parts of its tensors' names, those that may be absent, and the reading."""

    tensors: tuple[str, ...]
    optional: tuple[str, ...]
    unpack: Callable[[LinearFormat, Mapping[str, Tensor], int, int], StoredWeight]


_GPTQ = Scheme(gptq.TENSORS, gptq.OPTIONAL, gptq.unpack)
_PLAIN = Scheme(compressed_tensors.PLAIN, compressed_tensors.OPTIONAL, compressed_tensors.unpack)
SCHEMES: Mapping[str, Scheme] = MappingProxyType(
    {
        "awq": Scheme(awq.TENSORS, (), awq.unpack),
        "gptq": _GPTQ,
        "gptq_v2": _GPTQ,
        "pack-quantized": Scheme(
            compressed_tensors.PACKED, compressed_tensors.OPTIONAL, compressed_tensors.unpack
        ),
        "int-quantized": _PLAIN,
        "float-quantized": _PLAIN,
        "fp8": Scheme(fp8.TENSORS, (), fp8.unpack),
    }
)
# What checkpoints of these formats hold beside their weights: scales of activations and of KV caches, which are computed in
# floats here, and sizes of sparse masks.
UNUSED = ("input_scale", "input_zero_point", "k_scale", "v_scale", "q_scale", "activation_scale")


def read_quantization(values: Mapping[str, Any]) -> CheckpointQuantization | None:
    """What a config.json says of quantization; None where it holds no `quantization_config`.

    Raises:
        UnsupportedModelError: a method or a setting that is not read here, by name, with what is.
    """
    given = values.get("quantization_config")
    if not given:
        return None
    method = given.get("quant_method", "unknown") if isinstance(given, Mapping) else str(given)
    if method not in READERS:
        raise UnsupportedModelError(
            f"quantized checkpoints ({method}) are not supported",
            value=method,
            limit=sorted(READERS),
            param="quantization_config",
            remedy=f"Supported: {', '.join(sorted(READERS))}, and GGUF files. Or use the unquantized checkpoint of the model.",
        )
    return READERS[method](given)
