"""AWQ checkpoints, the "gemm" layout: 4-bit numbers with a zero point and a float16 scale per output and group of inputs.

`qweight` int32 [in, out / 8], `qzeros` int32 [groups, out / 8], `scales` [groups, out]. A word holds eight outputs in the
order 0 2 4 6 1 3 5 7, lowest bits first. Source: AutoAWQ 0.2.9, ``awq/modules/linear/gemm.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from engine.quantization.checkpoint import CheckpointQuantization, LinearFormat, group_size_of, require
from engine.quantization.stored_weight import StoredWeight, unpack_words

METHOD = "awq"
TENSORS = ("qweight", "qzeros", "scales")
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where in its word each of eight outputs is


def read_config(values: Mapping[str, Any]) -> CheckpointQuantization:
    """The formats of an AWQ `quantization_config`. Raises UnsupportedModelError for other widths and layouts."""
    bits = require({"bits": values.get("bits", values.get("w_bit", 4))}, "bits", (4,), method="AWQ")
    require({"version": str(values.get("version", "gemm")).lower()}, "version", ("gemm",), method="AWQ")
    require(values, "zero_point", (True,), default=True, method="AWQ")
    size = group_size_of(
        {"group_size": values.get("group_size", values.get("q_group_size", 128))}, method="AWQ"
    )
    stored = LinearFormat(scheme=METHOD, bits=bits, group_size=size, symmetric=False)
    # parts of names, wherever in a name they stand
    ignored = (f"re:.*{re.escape(str(name))}" for name in values.get("modules_to_not_convert") or ())
    return CheckpointQuantization(
        method=METHOD, groups=((("Linear",), stored),), ignored=("lm_head", *ignored)
    )


def unpack(stored: LinearFormat, parts: Mapping[str, Tensor], out: int, in_features: int) -> StoredWeight:
    """The weight [out, in] of one layer's tensors."""
    numbers, zeros = (_in_order(unpack_words(parts[name], 4)) for name in ("qweight", "qzeros"))
    size = in_features if stored.group_size < 0 else stored.group_size
    return StoredWeight(values=numbers.t(), scales=parts["scales"].t(), zeros=zeros.t(), group_size=size)


def _in_order(numbers: Tensor) -> Tensor:
    rows, columns = numbers.shape
    return numbers.view(rows, columns // 8, 8)[:, :, list(_PLACES)].view(rows, columns)
