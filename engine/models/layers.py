"""Building blocks of the decoder: linear, RMSNorm, rotary embedding, gated activation.

Boundary: dense arithmetic on [T, …] tensors; no cache, no batch, no weights file. Each layer has a batch-invariant form:
with `row_tile` set, a row's result does not depend on which other rows are computed with it. That is not free on a CPU,
where BLAS picks kernels by the number of rows, and where vectorised functions take another path in the last, partial
vector of a tensor or of a thread's share.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.kernels.invariant import in_pieces, tiled_linear


class Linear(nn.Module):
    """``x @ weight.T + bias`` for x [T, in]; the weight is allocated here and filled by the loader.

    `row_tile` 0: one product of whatever shape. `row_tile` M: products of exactly M rows, the last one padded with
    zeros, so that every row meets the same kernel and the same order of summation over `in`. `use_invariant_kernel`: the same
    by one Triton kernel, whatever the number of rows. `weight_device`: "meta" where the loader decides what holds the weight.
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

    def forward(self, x: Tensor) -> Tensor:
        if self.use_invariant_kernel:
            from engine.kernels.invariant_linear import invariant_linear

            return invariant_linear(x, self.weight, self.bias)
        if self.row_tile:
            return tiled_linear(x, self.weight, self.bias, self.row_tile)
        return F.linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """``x / rms(x) * weight`` over the last dimension, in float32 at least."""

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=device), requires_grad=False)
        self.eps = eps
        self.use_kernel = False  # one Triton kernel instead of torch's operations

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The norm of x; with a residual, ``residual += x`` and the norm of that, for which x's memory may be used."""
        if self.use_kernel:
            from engine.kernels.rms_norm import fused_add_rms_norm, rms_norm

            if residual is None:
                return rms_norm(x, self.weight, self.eps)
            return fused_add_rms_norm(x, residual, self.weight, self.eps)
        if residual is not None:
            x = residual.add_(x)
        wide = x if x.dtype == torch.float64 else x.float()
        scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(x.dtype)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotary embedding of x [T, heads, D] by its positions' rows of the table [T, D] (cosines, then sines).

    Value d pairs with d + D/2, as in Hugging Face checkpoints.
    """
    half = x.shape[-1] // 2
    cos, sin = table[:, None, :half], table[:, None, half:]
    first, second = x[..., :half].to(table.dtype), x[..., half:].to(table.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def gated_silu(gate_up: Tensor, *, invariant: bool, use_kernel: bool = False) -> Tensor:
    """``silu(gate) * up`` for the merged projection [T, 2 I] -> [T, I]."""
    if use_kernel:
        from engine.kernels.silu_and_mul import silu_and_mul

        return silu_and_mul(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return (in_pieces(F.silu, gate) if invariant else F.silu(gate)) * up
