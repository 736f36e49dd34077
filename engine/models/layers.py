"""Building blocks of the decoder: linear, norms, rotary embedding, ALiBi's slopes, gated activation.

Boundary: dense arithmetic on [T, …] tensors; no cache, no batch, no weights file. Each layer has a batch-invariant form:
with `row_tile` set, a row's result does not depend on which other rows are computed with it. That is not free on a CPU,
where BLAS picks kernels by the number of rows, and where vectorised functions take another path in the last, partial
vector of a tensor or of a thread's share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.kernels.invariant import in_pieces, tiled_linear

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "gelu": F.gelu}
)


class Linear(nn.Module):
    """``x @ weight.T + bias`` for x [T, in]; the weight is allocated here and filled by the loader.

    `row_tile` 0: one product of whatever shape. `row_tile` M: products of exactly M rows, the last one padded with
    zeros, so that every row meets the same kernel and the same order of summation over `in`. `use_invariant_kernel`: the same
    by one Triton kernel, whatever the number of rows. `weight_device`: "meta" where the loader decides what holds the weight.
    `all_reduce`: where other ranks hold the other inputs, sums a tensor over all of them; the bias is added to the sum.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
        weight_device: torch.device | None = None,
    ) -> None:
        super().__init__()
        empty = torch.empty(out_features, in_features, dtype=dtype, device=weight_device or device)
        self.weight = nn.Parameter(empty, requires_grad=False)
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(
                torch.empty(out_features, dtype=dtype, device=device), requires_grad=False
            )
        self.row_tile = 0
        self.use_invariant_kernel = False
        self.all_reduce: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.all_reduce is not None:
            total = self.all_reduce(F.linear(x, self.weight))
            return total if self.bias is None else total.add_(self.bias)
        if self.use_invariant_kernel:
            from engine.kernels.invariant_linear import invariant_linear

            return invariant_linear(x, self.weight, self.bias)
        if self.row_tile:
            return tiled_linear(x, self.weight, self.bias, self.row_tile)
        return F.linear(x, self.weight, self.bias)

    def targets(self, parts: Iterable[tuple[str, int]]) -> Iterator[tuple[str, Tensor]]:
        """Checkpoint tensors of the projections that it merges, each (name, outputs), with the view that they fill."""
        first = 0
        for name, size in parts:
            yield f"{name}.weight", self.weight[first : first + size]
            if self.bias is not None:
                yield f"{name}.bias", self.bias[first : first + size]
            first += size


class RMSNorm(nn.Module):
    """``x / rms(x) * weight`` over the last dimension, in float32 at least.

    With `offset` it is ``1 + weight``, and the result is rounded once, after the weight: Gemma's norm.
    """

    def __init__(
        self, size: int, eps: float, *, dtype: torch.dtype, device: torch.device, offset: bool = False
    ) -> None:
        super().__init__()
        self.offset = offset
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=device), requires_grad=False)
        self.eps = eps
        self.use_kernel = False  # one Triton kernel instead of torch's operations

    def targets(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """Checkpoint tensors, each with the parameter that it fills."""
        yield f"{name}.weight", self.weight

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The norm of x; with a residual, ``residual += x`` and the norm of that, for which x's memory may be used."""
        if self.use_kernel:
            from engine.kernels.rms_norm import fused_add_rms_norm, rms_norm

            if residual is None:
                return rms_norm(x, self.weight, self.eps, offset=self.offset)
            return fused_add_rms_norm(x, residual, self.weight, self.eps, offset=self.offset)
        if residual is not None:
            x = residual.add_(x)
        wide = x if x.dtype == torch.float64 else x.float()
        scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        if self.offset:
            return (wide * scale * (1.0 + self.weight.to(wide.dtype))).to(x.dtype)
        return self.weight * (wide * scale).to(x.dtype)


class LayerNorm(nn.Module):
    """``(x - mean) / deviation * weight + bias`` over the last dimension."""

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=device), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(size, dtype=dtype, device=device), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The norm of x; with a residual, ``residual += x`` and the norm of that."""
        if residual is not None:
            x = residual.add_(x)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def targets(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """Checkpoint tensors, each with the parameter that it fills."""
        yield f"{name}.weight", self.weight
        yield f"{name}.bias", self.bias


def alibi_slopes(num_heads: int) -> Tensor:
    """How fast each head's scores fall with the distance, float32 [H] on the CPU.

    A geometric series for a power of two; for another number that of the power below, then every other one of the power above.
    Source: "Train Short, Test Long" (Press et al. 2022) and its reference implementation.
    """
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    slopes += [2.0 ** (-8.0 * (i + 0.5) / power) for i in range(num_heads - power)]
    return torch.tensor(slopes, dtype=torch.float32)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotary embedding of x [T, heads, D] by its positions' rows of the table [T, R] (cosines, then sines).

    The first R of the D values are turned: d pairs with d + R/2, as in Hugging Face checkpoints.
    """
    size = table.shape[-1]
    half = size // 2
    cos, sin = table[:, None, :half], table[:, None, half:]
    first, second = x[..., :half].to(table.dtype), x[..., half:size].to(table.dtype)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return turned if size == x.shape[-1] else torch.cat((turned, x[..., size:]), dim=-1)


def gated(gate_up: Tensor, activation: str, *, invariant: bool, use_kernel: bool = False) -> Tensor:
    """``activation(gate) * up`` for the merged projection [T, 2 I] -> [T, I]. `use_kernel`: "silu" and "gelu_tanh" alone."""
    if use_kernel:
        from engine.kernels.silu_and_mul import gelu_tanh_and_mul, silu_and_mul

        assert activation in ("silu", "gelu_tanh"), activation
        return silu_and_mul(gate_up) if activation == "silu" else gelu_tanh_and_mul(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    function = ACTIVATIONS[activation]
    return (in_pieces(function, gate) if invariant else function(gate)) * up


def softcapped(x: Tensor, cap: float, *, invariant: bool) -> Tensor:
    """``cap * tanh(x / cap)``, in x's dtype."""
    x = x / cap
    return (in_pieces(torch.tanh, x) if invariant else torch.tanh(x)) * cap
