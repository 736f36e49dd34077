"""GPTQ checkpoints: numbers of 2, 4 or 8 bits with a zero point and a scale per output and group of inputs.

`qweight` int32 [in * bits / 32, out] packs inputs, `qzeros` int32 [groups, out * bits / 32] packs outputs, `scales`
[groups, out]; `g_idx` int32 [in] names each input's group, out of order where activations were ordered (`desc_act`). Files of
the first version hold each zero point less one; those with ``checkpoint_format: gptq_v2`` hold it as it is.
Source: AutoGPTQ 0.7.1, ``auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engine.quantization.checkpoint import CheckpointQuantization, LinearFormat, group_size_of, require
from engine.quantization.stored_weight import StoredWeight, unpack_words

METHOD = "gptq"
TENSORS = ("qweight", "qzeros", "scales", "g_idx")
OPTIONAL = ("g_idx",)
BITS = (2, 4, 8)


def read_config(values: Mapping[str, Any]) -> CheckpointQuantization:
    """The formats of a GPTQ `quantization_config`; `dynamic` overrides by name, lm_head as it says.

    Raises:
        UnsupportedModelError: a width or a layout that is not read here.
    """
    layout = require(values, "checkpoint_format", ("gptq", "gptq_v2"), default="gptq", method="GPTQ")
    groups: list[tuple[tuple[str, ...], LinearFormat]] = []
    ignored = [] if values.get("lm_head") else ["lm_head"]
    for pattern, changes in (values.get("dynamic") or {}).items():
        # GPTQModel's rules: "-:" before a pattern leaves the module as it is, "+:" or nothing changes its settings
        name = "re:" + re.sub(r"^[+-]:", "", pattern)
        if pattern.startswith("-:"):
            ignored.append(name)
        else:
            groups.append(((name,), _format({**values, **changes}, layout)))
    ignored += [f"re:.*{re.escape(str(name))}" for name in values.get("modules_to_not_convert") or ()]
    groups.append((_targets(values), _format(values, layout)))
    return CheckpointQuantization(method=METHOD, groups=tuple(groups), ignored=tuple(ignored))


def _format(values: Mapping[str, Any], layout: str) -> LinearFormat:
    bits = require(values, "bits", BITS, method="GPTQ")
    size = group_size_of(values, method="GPTQ")
    return LinearFormat(scheme=layout, bits=bits, group_size=size, symmetric=False)


def _targets(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Every linear layer, or those of `modules_in_block_to_quantize`."""
    blocks = values.get("modules_in_block_to_quantize") or []
    return tuple(name for names in blocks for name in ([names] if isinstance(names, str) else names)) or (
        "Linear",
    )


def unpack(stored: LinearFormat, parts: Mapping[str, Tensor], out: int, in_features: int) -> StoredWeight:
    """The weight [out, in] of one layer's tensors. Raises IndexError where `g_idx` names a group without scales."""
    numbers = unpack_words(parts["qweight"].t(), stored.bits)
    zeros = unpack_words(parts["qzeros"], stored.bits).t()
    if stored.scheme == "gptq":
        zeros = (zeros + 1) & ((1 << stored.bits) - 1)
    size = in_features if stored.group_size < 0 else stored.group_size
    order = parts.get("g_idx")
    scales = parts["scales"].t()
    return StoredWeight(
        values=numbers, scales=scales, zeros=zeros, group_size=size,
        group_of=None if order is None else _out_of_order(order.long(), size, scales.shape[1]),
    )  # fmt: skip


def _out_of_order(group_of: Tensor, size: int, num_groups: int) -> Tensor | None:
    """The groups by input where they are not simply one after the other."""
    low, high = torch.aminmax(group_of)
    if low < 0 or high >= num_groups:
        raise IndexError(f"g_idx names group {int(low if low < 0 else high)} of {num_groups}")
    plain = torch.arange(len(group_of), device=group_of.device) // size
    return None if torch.equal(group_of, plain) else group_of
