"""fp8 checkpoints: `weight` float8_e4m3fn [out, in] with a scale for each block of it, or one for all of it.

DeepSeek and Qwen3 store blocks: `weight_scale_inv` float32 [out / 128, in / 128], rounded up, multiplies what is stored (the
name says what divided it before). Without `weight_block_size` a layer has one `weight_scale`, as compressed-tensors stores it.
Source: transformers 5.23, ``integrations/finegrained_fp8.py``; DeepSeek-V3, ``inference/kernel.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from engine.errors import UnsupportedModelError
from engine.quantization.checkpoint import CheckpointQuantization, LinearFormat, require
from engine.quantization.stored_weight import StoredWeight

METHOD = "fp8"
TENSORS = ("weight", "weight_scale_inv")


def read_config(values: Mapping[str, Any]) -> CheckpointQuantization:
    """The formats of an fp8 `quantization_config`. Raises UnsupportedModelError for another fp8 format or odd blocks."""
    require(values, "fmt", ("e4m3",), default="e4m3", method="fp8")
    block = values.get("weight_block_size")
    ignored = ("lm_head", *(values.get("modules_to_not_convert") or values.get("ignored_layers") or ()))
    if block is None:
        stored = LinearFormat(scheme="float-quantized", bits=8, block_rows=0)
    elif (
        isinstance(block, list | tuple)
        and len(block) == 2
        and all(isinstance(n, int) and n > 0 for n in block)
    ):
        stored = LinearFormat(scheme=METHOD, bits=8, group_size=block[1], block_rows=block[0])
    else:
        raise UnsupportedModelError(
            f"fp8 checkpoints with weight_block_size {block!r} are not supported", value=block, limit=[128, 128],
            param="quantization_config.weight_block_size",
            remedy="Use a checkpoint with scales by blocks, or one in the compressed-tensors format.",
        )  # fmt: skip
    return CheckpointQuantization(method=METHOD, groups=((("Linear",), stored),), ignored=ignored)


def unpack(stored: LinearFormat, parts: Mapping[str, Tensor], out: int, in_features: int) -> StoredWeight:
    """The weight [out, in] of one layer's tensors."""
    return StoredWeight(
        values=parts["weight"], scales=parts["weight_scale_inv"], block_rows=stored.block_rows, group_size=stored.group_size
    )  # fmt: skip
