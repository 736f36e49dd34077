"""compressed-tensors checkpoints: integers in words ("pack-quantized") or bytes ("int-quantized"), and fp8 ("float-quantized").

`weight_packed` int32 [out, in * bits / 32] with `weight_shape`, or `weight` int8 or float8_e4m3fn [out, in]; `weight_scale`
[out, groups], [out, 1], [1] or by blocks; `weight_zero_point` packs outputs, or is int8. Numbers are signed; in words each is
2^(bits - 1) more. What an engine of this format would round of the activations is not rounded here, but for fp8 products of
a GPU that take them row by row as they come. Source: compressed-tensors 0.20, ``compressors/pack_quantized``, ``naive_quantized``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engine.errors import UnsupportedModelError
from engine.quantization.checkpoint import ROW, CheckpointQuantization, LinearFormat, require
from engine.quantization.stored_weight import StoredWeight, unpack_words

METHOD = "compressed-tensors"
PACKED = ("weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight_g_idx")
PLAIN = ("weight", "weight_scale", "weight_zero_point")
OPTIONAL = ("weight_zero_point", "weight_g_idx", "weight_shape")
FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
STRATEGIES = ("tensor", "channel", "group", "block")


def read_config(values: Mapping[str, Any]) -> CheckpointQuantization:
    """The formats of a compressed-tensors `quantization_config`, group by group.

    Raises:
        UnsupportedModelError: a format, width or strategy that is not read here, sparse weights, or transforms.
    """
    if (values.get("sparsity_config") or {}).get("format", "dense") != "dense":
        _refuse("sparsity_config", values["sparsity_config"])
    if (values.get("transform_config") or {}).get("config_groups"):
        _refuse("transform_config", values["transform_config"])
    groups = []
    for group in (values.get("config_groups") or {}).values():
        if not isinstance(group, Mapping) or not group.get("weights"):
            _refuse("config_groups", group)
        groups.append((tuple(group.get("targets") or ()), _format(group, values.get("format"))))
    ignored = tuple(str(name) for name in values.get("ignore") or ())
    return CheckpointQuantization(method=METHOD, groups=tuple(groups), ignored=ignored)


def _refuse(key: str, value: Any) -> None:
    raise UnsupportedModelError(
        f"compressed-tensors checkpoints with this {key} are not supported: {value}",
        value=value,
        limit=FORMATS,
        param=f"quantization_config.{key}",
        remedy="Use a checkpoint of quantized weights alone, or the unquantized one of the model.",
    )


def _format(group: Mapping[str, Any], whole: Any) -> LinearFormat:
    """The format of one config group. `whole`: the checkpoint's own, for groups that name none."""
    weights, inputs = group["weights"], group.get("input_activations")
    scheme = require({"format": group.get("format") or whole}, "format", FORMATS, method=METHOD)
    strategy = require(weights, "strategy", STRATEGIES, default="tensor", method=METHOD)
    kind = require(weights, "type", ("int", "float"), default="int", method=METHOD)
    if scheme == "naive-quantized":
        scheme = f"{kind}-quantized"
    allowed = (4, 8) if scheme == "pack-quantized" else (8,)
    bits = require(weights, "num_bits", allowed, default=8, method=METHOD)
    require(
        weights, "type", ("float",) if scheme == "float-quantized" else ("int",), default="int", method=METHOD
    )
    block = weights.get("block_structure") or [1, ROW]
    if isinstance(block, str):  # "128x128", as older versions wrote it
        block = [int(size) for size in block.split("x")]
    size = {"group": weights.get("group_size") or ROW, "block": block[1]}.get(strategy, ROW)
    return LinearFormat(
        scheme=scheme, bits=bits, group_size=size, block_rows={"tensor": 0, "block": block[0]}.get(strategy, 1),
        symmetric=bool(weights.get("symmetric", True)),
        dynamic_inputs=bool(
            inputs and inputs.get("dynamic") is True and inputs.get("type") == "float" and inputs.get("strategy") == "token"
        ),
    )  # fmt: skip


def unpack(stored: LinearFormat, parts: Mapping[str, Tensor], out: int, in_features: int) -> StoredWeight:
    """The weight [out, in] of one layer's tensors."""
    scales = parts["weight_scale"]
    scales = scales.reshape(1, 1) if scales.numel() == 1 else scales.reshape(scales.shape[0], -1)
    size = in_features if stored.group_size < 0 else stored.group_size
    rows = stored.block_rows or out
    if stored.scheme == "float-quantized":
        return StoredWeight(values=parts["weight"], scales=scales, block_rows=rows, group_size=size)
    if stored.scheme == "int-quantized":
        zeros = parts.get("weight_zero_point")
        return StoredWeight(
            values=parts["weight"].to(torch.int16), scales=scales, block_rows=rows, group_size=size,
            zeros=None if zeros is None else zeros.to(torch.int16).reshape(scales.shape),
        )  # fmt: skip
    zeros = torch.full(scales.shape, 1 << (stored.bits - 1), dtype=torch.int16, device=scales.device)
    if not stored.symmetric:
        zeros = unpack_words(parts["weight_zero_point"].t(), stored.bits).t()[: scales.shape[0]]
    order = parts.get("weight_g_idx")
    return StoredWeight(
        values=unpack_words(parts["weight_packed"], stored.bits)[:, :in_features], scales=scales, zeros=zeros,
        block_rows=rows, group_size=size, group_of=None if order is None or bool((order < 0).any()) else order.long(),
    )  # fmt: skip
