"""StoredWeight: what every scheme reads out of its tensors: numbers, scales, zero points, and which input has which.

``weight[o, i] = (values[o, i] - zeros[r, g]) * scales[r, g]`` with r and g the block of rows and the group of inputs that
o and i lie in. It becomes floats (`dequantize`), or our own quantized weight where that holds the same numbers (`fuse`).

Boundary: torch on any device. Packing into words is each scheme's; products are ``engine.kernels``'.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.quantized_weight import (
    GROUP,
    Fp8Weight,
    Int4Weight,
    Int8Weight,
    QuantizedWeight,
    pack_int4,
)

PIECE_VALUES = 1 << 22  # dequantized at once: 16 MiB of float32, and a few times that on the way


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWeight:
    """One linear layer's weight [out, in] as a checkpoint holds it, unpacked."""

    values: Tensor  # int16, or float8_e4m3fn [out, in]
    scales: Tensor  # [row blocks, groups], in the checkpoint's dtype
    zeros: Tensor | None = None  # int16 [row blocks, groups]; None: all zero
    block_rows: int = 1  # outputs of a block of rows
    group_size: int  # inputs of a group
    group_of: Tensor | None = None  # int64 [in]: the group of each input, where they are not in order

    def dequantize(self) -> Tensor:
        """The weight [out, in] in the scales' dtype: each product rounded once, as the formats' own libraries do it."""
        wide = torch.promote_types(self.scales.dtype, torch.float32)
        values = self.values
        if self.zeros is not None:
            values = values - self._spread(self.zeros)
        return (values.to(wide) * self._spread(self.scales).to(wide)).to(self.scales.dtype)

    def copy_to(self, target: Tensor) -> None:
        """Fill target [out, in] with the weight, some rows at a time: unpacked it takes several times its memory."""
        out, in_features = self.values.shape
        block = self.block_rows if self.block_rows < out else 1
        step = max(1, PIECE_VALUES // in_features // block) * block
        for first in range(0, out, step):
            target[first : first + step].copy_(self._rows(first, min(first + step, out)).dequantize())

    def _rows(self, first: int, last: int) -> StoredWeight:
        """Some rows of the weight, from the beginning of a block."""
        blocks = slice(None)
        if self.block_rows < self.values.shape[0]:
            blocks = slice(first // self.block_rows, -(-last // self.block_rows))
        zeros = None if self.zeros is None else self.zeros[blocks]
        return replace(self, values=self.values[first:last], scales=self.scales[blocks], zeros=zeros)

    def fuse(self) -> QuantizedWeight | None:
        """Our own quantized weight of the very same numbers and scales; None where no form holds them.

        Its products take the scales as they are and round none of the weight's values, which `dequantize` does.
        """
        if self.values.dtype == torch.float8_e4m3fn:
            return Fp8Weight(self.values, self._row_scales()) if self._is_by_row else None
        if self.block_rows != 1 or self.group_of is not None:
            return None
        return self._fuse_int4() or self._fuse_int8()

    @property
    def _is_by_row(self) -> bool:
        """Whether no output has more than one scale, nor shares it with some but not all."""
        return self.scales.shape[1] == 1 and (self.block_rows == 1 or self.scales.shape[0] == 1)

    def _row_scales(self) -> Tensor:
        return self.scales[:, 0].float().expand(self.values.shape[0]).contiguous()

    def _fuse_int4(self) -> Int4Weight | None:
        if self.zeros is None or (self.group_size % GROUP and self.scales.shape[1] > 1):
            return None
        if any(low < 0 or high > 15 for low, high in map(torch.aminmax, (self.values, self.zeros))):
            return None
        num_groups = -(-self.values.shape[1] // GROUP)
        each = self.group_size // GROUP if self.scales.shape[1] > 1 else num_groups
        scales, zeros = (
            part.repeat_interleave(each, 1)[:, :num_groups] for part in (self.scales, self.zeros)
        )
        return pack_int4(self.values, scales, zeros)

    def _fuse_int8(self) -> Int8Weight | None:
        if not self._is_by_row:
            return None
        values = self.values if self.zeros is None else self.values - self.zeros
        low, high = torch.aminmax(values)
        if low < -128 or high > 127:
            return None
        padded = F.pad(values.to(torch.int8), (0, -values.shape[1] % GROUP)).contiguous()
        return Int8Weight(padded, self._row_scales(), values.shape[1])

    def _spread(self, grid: Tensor) -> Tensor:
        """Scales or zero points [row blocks, groups] by output and input, or in a shape that broadcasts to it."""
        out, in_features = self.values.shape
        if 1 < self.block_rows < out:
            grid = grid.repeat_interleave(self.block_rows, 0)[:out]
        if self.group_of is not None:
            return grid[:, self.group_of]
        if grid.shape[1] > 1:
            grid = grid.repeat_interleave(self.group_size, 1)[:, :in_features]
        return grid


def merge(weights: list[QuantizedWeight]) -> QuantizedWeight | None:
    """One weight of several that multiply the same inputs, their outputs one after the other; None: of unlike forms."""
    first = weights[0]
    if any(type(each) is not type(first) or each.scales.dtype != first.scales.dtype for each in weights):
        return None
    values = torch.cat([each.values for each in weights])
    if isinstance(first, Int4Weight):
        zeros = torch.cat([each.zeros for each in weights if isinstance(each, Int4Weight)], 1)
        return Int4Weight(values, torch.cat([each.scales for each in weights], 1), zeros, first.in_features)
    scales = torch.cat([each.scales for each in weights])
    return (
        Fp8Weight(values, scales)
        if isinstance(first, Fp8Weight)
        else Int8Weight(values, scales, first.in_features)
    )


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """Unsigned numbers of `bits` (a divisor of 32) from int32 [..., n], lowest bits first: int16 [..., n * 32 / bits]."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    numbers = (words[..., None] >> shifts) & ((1 << bits) - 1)
    return numbers.to(torch.int16).flatten(-2)
