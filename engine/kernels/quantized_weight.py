"""Quantized weights: how int8, int4 and fp8 hold a linear layer's weight [out, in], to the bit.

Boundary: torch on any device; formats, rounding and its inverse. Products with them: `engine.kernels.weight_only` and
`engine.kernels.fp8_linear`. Nothing is calibrated on data; the formats of others are ``engine.quantization``'s.

Every quantizer works row by row in float32 and rounds ties to even. A row or group of zeros has scale 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 128  # inputs that share a scale in int4; every format but fp8 pads its rows to whole groups
FP8_MAX = 448.0  # the largest float8_e4m3fn
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """``weight[o, i] = values[o, i] * scales[o]``, values in [-127, 127], of a checkpoint down to -128; inputs past `in_features` are 0."""

    values: Tensor  # int8 [out, in padded to GROUP]
    scales: Tensor  # float32 [out]
    in_features: int

    @property
    def out_features(self) -> int:
        return self.values.shape[0]

    def dequantize(self) -> Tensor:
        """The weight [out, in] in float32."""
        return self.values[:, : self.in_features].float() * self.scales[:, None]


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """``weight[o, i] = (n - zeros[g, o]) * scales[g, o]`` with g = i // GROUP and n the 4-bit number of input i.

    Byte b of a group holds n of input b in its low half, and n - 8 of input b + GROUP / 2, in two's complement, in its
    high half: either half of the bytes meets neighbouring inputs, and as signed bytes both are one mask away from a
    number that a product can take.
    """

    values: Tensor  # int8 [out, groups * GROUP / 2]
    scales: Tensor  # bfloat16 [groups, out]; of a checkpoint in its own dtype
    zeros: Tensor  # uint8 [groups, out], 0 … 15
    in_features: int

    @property
    def out_features(self) -> int:
        return self.values.shape[0]

    def dequantize(self) -> Tensor:
        """The weight [out, in] in float32."""
        out, groups = self.out_features, self.scales.shape[0]
        halves = self.values.view(out, groups, GROUP // 2)
        numbers = torch.cat((halves & 15, (halves >> 4) + 8), dim=-1).float()
        wide = (numbers - self.zeros.t().float()[:, :, None]) * self.scales.t().float()[:, :, None]
        return wide.view(out, groups * GROUP)[:, : self.in_features]


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """``weight[o, i] = values[o, i] * scales[o]``."""

    values: Tensor  # float8_e4m3fn [out, in]
    scales: Tensor  # float32 [out]

    @property
    def out_features(self) -> int:
        return self.values.shape[0]

    def dequantize(self) -> Tensor:
        """The weight [out, in] in float32."""
        return self.values.float() * self.scales[:, None]


QuantizedWeight = Int8Weight | Int4Weight | Fp8Weight


def quantize_int8(weight: Tensor) -> Int8Weight:
    """One symmetric scale per output: ``scale = max|w| / 127``, ``value = round(w / scale)``. weight [out, in]."""
    wide = weight.float()
    scales = _or_one(wide.abs().amax(dim=1) / 127)
    values = (wide / scales[:, None]).round().clamp(-127, 127).to(torch.int8)
    return Int8Weight(_pad_to_groups(values), scales, weight.shape[1])


def quantize_int4(weight: Tensor) -> Int4Weight:
    """One scale and zero point per output and group of GROUP inputs. weight [out, in].

    With low = min(w, 0) and high = max(w, 0) over the group: ``scale = (high - low) / 15`` rounded to bfloat16,
    ``zero = round(-low / scale)``, ``n = round(w / scale) + zero``, both kept within 0 … 15. Padding has n = zero.

    Source: chosen by accuracy. Mean KL divergence of the bundled model's next-token distributions over three texts, in
    nats: this 0.089; symmetric, the largest value at -8, 0.109; this with the range of least squared error 0.092
    (torch on a CPU, float32, November 2026).
    """
    out, in_features = weight.shape
    groups = _pad_to_groups(weight.float()).view(out, -1, GROUP)
    low, high = groups.amin(dim=-1).clamp(max=0.0), groups.amax(dim=-1).clamp(min=0.0)
    scales = _or_one((high - low) / 15).bfloat16()
    wide = scales.float()
    zeros = (-low / wide).round().clamp(0, 15)
    numbers = ((groups / wide[:, :, None]).round() + zeros[:, :, None]).clamp(0, 15)
    return pack_int4(numbers.view(out, -1)[:, :in_features], scales, zeros)


def pack_int4(numbers: Tensor, scales: Tensor, zeros: Tensor) -> Int4Weight:
    """Numbers 0 … 15 [out, in] in our layout; scales and zeros [out, groups] as they are. Padding has n = zero."""
    out, in_features = numbers.shape
    missing = -in_features % GROUP
    padded = F.pad(numbers.to(torch.int8), (0, missing)).contiguous()
    if missing:
        padded[:, in_features:] = zeros[:, -1:].to(torch.int8)
    low, high = padded.view(out, -1, GROUP).chunk(2, dim=-1)
    values = (low | ((high - 8) << 4)).view(out, -1)
    return Int4Weight(values, scales.t().contiguous(), zeros.to(torch.uint8).t().contiguous(), in_features)


def quantize_fp8(weight: Tensor) -> Fp8Weight:
    """One scale per output: ``scale = max|w| / 448``, ``value = float8_e4m3fn(w / scale)``. weight [out, in]."""
    return Fp8Weight(*quantize_rows_fp8(weight))


def quantize_rows_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x [n, size] in float8_e4m3fn, and their scales [n], float32: each row's largest value becomes 448.

    A row's result does not depend on the rows beside it.
    """
    wide = x.float()
    scales = _or_one(wide.abs().amax(dim=1) / FP8_MAX)
    # The conversion turns what is beyond the range into not-a-number: a quotient may be half a bit above it.
    return (wide / scales[:, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8), scales


def _or_one(scales: Tensor) -> Tensor:
    return torch.where(scales > 0, scales, torch.ones_like(scales))


def _pad_to_groups(rows: Tensor) -> Tensor:
    return F.pad(rows, (0, -rows.shape[1] % GROUP)).contiguous()
