"""Batch-invariant forms of plain torch operations: a row's result has the same bits whatever rows are beside it.

On a CPU this is not free: BLAS picks its kernel by the number of rows, and vectorised functions take another path in the
last, partial vector of a tensor or of a thread's share of it. Here every call has one fixed shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Values of one call of a vectorised function in batch-invariant mode: below torch's grain of 32768, so one thread
# computes them, and a multiple of every SIMD width, so that only the last call of a tensor has a partial vector.
PIECE = 16384


def tiled_linear(x: Tensor, weight: Tensor, bias: Tensor | None, row_tile: int) -> Tensor:
    """``F.linear`` in products of exactly `row_tile` rows. x [T, in] -> [T, out]."""
    rows = x.shape[0]
    num_tiles = -(-rows // row_tile)
    padded = F.pad(x, (0, 0, 0, num_tiles * row_tile - rows)).contiguous()
    out = torch.empty(num_tiles * row_tile, weight.shape[0], dtype=x.dtype, device=x.device)
    for tile, target in zip(torch.split(padded, row_tile), torch.split(out, row_tile), strict=True):
        torch.mm(tile, weight.t(), out=target)
    out = out[:rows]
    return out if bias is None else out + bias


def in_pieces(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """An elementwise function of x, so that equal values give equal results wherever they stand in x."""
    flat = x.reshape(-1)
    padded = F.pad(flat, (0, -flat.numel() % 64))
    return torch.cat([function(piece) for piece in torch.split(padded, PIECE)])[: flat.numel()].view(x.shape)


def find_row_tile(weights: Sequence[Tensor], candidates: tuple[int, ...] = (16, 8, 4, 2, 1)) -> int:
    """The first tile size whose products give a row the same bits in every place of the tile, on this machine.

    Each distinct shape of `weights` [out, in] is tried with random rows, once as they are and once shifted by one place.
    Raises AssertionError when not even single rows repeat, which no BLAS in use does.
    """
    shapes = {tuple(w.shape): w for w in weights}
    for tile in candidates:
        if all(_repeats(w, tile) for w in shapes.values()):
            return tile
    raise AssertionError(f"products on {weights[0].device} do not repeat even row by row")


def _repeats(weight: Tensor, tile: int) -> bool:
    generator = torch.Generator().manual_seed(tile)
    rows = torch.randn(2 * tile, weight.shape[1], generator=generator).to(weight)
    filler = torch.randn(weight.shape, generator=generator).to(weight)  # the weights may not be loaded yet
    straight = tiled_linear(rows, filler, None, tile)
    again = tiled_linear(rows.roll(1, 0), filler, None, tile).roll(-1, 0)
    return torch.equal(straight, again)
