"""Linear layers on a CPU with weights packed once for the compiled product (``packed_linear.cpp``).

Every output sums over its inputs in ascending order whatever the number of rows, so a row's result has the same bits in
any batch: deterministic mode needs no padding here. Weights that bfloat16 holds exactly (checkpoints are mostly bfloat16)
are packed as bfloat16 and widened on load also in float32 mode: half the memory traffic, the same bits.

Measured on 2 cores of a Cascade Lake Xeon (AVX-512, no bf16), float32, 256 -> 1408, GFLOP/s at 1 / 8 / 32 / 128 rows:
F.linear 19 / 59 / 60 / 214, oneDNN prepacked 8 / 47 / 117 / 190, MKL prepacked 18 / 111 / 161 / 244, this 21 / 106 / 188 /
200 (November 2026). Boundary: one product; `packed_linear_ref` is the oracle.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.cpu_library import CpuLibrary

EXACT_ROWS = 64  # compared at once


class Packed(ctypes.Structure):
    """``quire::Packed`` of packed_linear.cpp."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("in_features", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
        ("narrow", ctypes.c_int64),
    ]


def packed_linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` in float32, rounded to x's dtype. x [T, in], weight [out, in]."""
    wide = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    return wide.to(x.dtype)


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A packed weight [out, in] and the memory that its `descriptor` points into."""

    values: Tensor
    bias: Tensor | None
    descriptor: Packed

    @property
    def num_bytes(self) -> int:
        return self.values.nbytes + (self.bias.nbytes if self.bias is not None else 0)


def pack_weight(
    library: CpuLibrary,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gated: bool = False,
    narrow: bool | None = None,
) -> PackedWeight:
    """Copy a weight [out, in] (float32 or bfloat16) into panels.

    `gated`: the weight is a merged [gates; values] projection of 2 I outputs, packed so that a panel holds gates and the
    values that they gate side by side; only the fused decoder's gated product understands it. `narrow`: keep bfloat16
    panels; None: where that loses nothing.
    """
    assert weight.dtype in (torch.float32, torch.bfloat16), weight.dtype
    out_features, in_features = weight.shape
    width = library.panel_width
    bias = None if bias is None else bias.float()
    if gated and bias is not None:
        bias = _alternate(bias, width // 2)
    if narrow is None:
        narrow = in_features % 2 == 0 and _is_exact_in_bf16(weight)
    assert not narrow or in_features % 2 == 0, f"bfloat16 panels hold pairs of inputs, not {in_features}"
    weight = weight.contiguous()
    rows = -(-out_features // width) * width
    values = torch.empty(rows * in_features, dtype=torch.bfloat16 if narrow else torch.float32)
    library.functions.quire_pack(
        weight.data_ptr(), values.data_ptr(), out_features, in_features, int(weight.dtype == torch.bfloat16),
        int(narrow), int(gated), torch.get_num_threads(),
    )  # fmt: skip
    if bias is not None:
        bias = F.pad(bias, (0, rows - bias.shape[0])).contiguous()
    descriptor = Packed(
        values.data_ptr(),
        bias.data_ptr() if bias is not None else None,
        in_features,
        out_features,
        int(narrow),
    )
    return PackedWeight(values, bias, descriptor)


def packed_linear(library: CpuLibrary, x: Tensor, packed: PackedWeight) -> Tensor:
    """``x @ weight.T + bias``: x [T, in] float32 or bfloat16 -> [T, out] in x's dtype."""
    x = x.contiguous()
    shape = packed.descriptor
    assert x.shape[1] == shape.in_features, (x.shape, shape.in_features)
    assert x.dtype in (torch.float32, torch.bfloat16), x.dtype
    out = torch.empty(x.shape[0], shape.out_features, dtype=x.dtype)
    library.functions.quire_linear(
        ctypes.byref(shape), x.data_ptr(), out.data_ptr(), x.shape[0], int(x.dtype == torch.bfloat16), out.shape[1],
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def _is_exact_in_bf16(weight: Tensor) -> bool:
    """Whether the lower half of every value's bits is zero. A few rows at a time: mostly the first ones tell."""
    if weight.dtype == torch.bfloat16:
        return True
    bits = weight.numpy().view(np.uint32)
    pieces = (bits[first : first + EXACT_ROWS] for first in range(0, len(bits), EXACT_ROWS))
    return not any(np.bitwise_or.reduce(piece, axis=None) & 0xFFFF for piece in pieces)


def _alternate(bias: Tensor, half: int) -> Tensor:
    """[gates; values] -> gates 0 … half-1, values 0 … half-1, the next gates, …; padded with zeros to whole pieces."""
    padded = [F.pad(part, (0, -len(part) % half)) for part in bias.chunk(2)]
    return torch.stack([part.view(-1, half) for part in padded], dim=1).flatten()
