"""LoRA over a batch of many adapters: ``y += scale · (x Aᵀ) Bᵀ`` with each token's own A, B and scale.

Adapters stand side by side in slots; tokens are listed by slot. A merged projection (q, k and v; gate and up) has a part
for each projection in it: their A are stacked, so that all of them are one product, and an output of part p takes the
columns of part p. An adapter of a lower rank than the slot's is padded with zeros.

Boundary: the definition, in torch, on any device. The kernels for GPUs: `engine.kernels.grouped_lora`.
Source of the idea: Chen et al., "Punica: Multi-Tenant LoRA Serving", 2023.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.invariant import tiled_linear


@dataclass(frozen=True, slots=True)
class SlotWeights:
    """What the slots hold for one linear layer. S slots, P parts, R rank of a slot."""

    a: Tensor  # [S, P R, in]
    b: Tensor  # [S, out, R]
    scales: Tensor  # [S, P] float32 (float64 beside float64 weights)
    sizes: tuple[int, ...]  # outputs of each part, out in all

    @property
    def rank(self) -> int:
        return self.b.shape[2]


@dataclass(frozen=True, slots=True)
class TokenSlots:
    """The tokens of a step by slot: those of slot s are ``order[starts[s] : starts[s + 1]]``. The others use no adapter."""

    order: Tensor  # [T] int32
    starts: Tensor  # [S + 1] int32


def tokens_by_slot(slots: Tensor, num_slots: int) -> TokenSlots:
    """`slots` [T]: each token's slot, -1 for none. Launches depend on T alone, and nothing is asked of the host."""
    ordered, order = torch.sort(slots, stable=True)
    wanted = torch.arange(num_slots + 1, dtype=ordered.dtype, device=slots.device)
    return TokenSlots(order.int(), torch.searchsorted(ordered, wanted).int())


def lora_add_ref(
    y: Tensor, x: Tensor, weights: SlotWeights, tokens: TokenSlots, *, row_tile: int = 0
) -> None:
    """Add to y [T, out] what the adapters of its tokens make of x [T, in].

    Sums are taken in float32 (float64 beside float64 weights); x Aᵀ is scaled, then rounded to x's dtype, as the
    kernels multiply it. `row_tile` M: products of exactly M rows, so that a token's result has the same bits whatever
    shares its step.
    """
    wide, rank = weights.scales.dtype, weights.rank

    def product(left: Tensor, right: Tensor) -> Tensor:
        return tiled_linear(left, right, None, row_tile) if row_tile else F.linear(left, right)

    for slot, (first, end) in enumerate(pairwise(tokens.starts.tolist())):
        if first == end:
            continue
        rows = tokens.order[first:end].long()
        a, b = weights.a[slot].to(wide), weights.b[slot].to(wide)
        low = product(x[rows].to(wide), a) * weights.scales[slot].repeat_interleave(rank)
        lows = torch.split(low.to(x.dtype).to(wide), rank, dim=1)
        parts = torch.split(b, list(weights.sizes))
        delta = torch.cat([product(part, own) for part, own in zip(lows, parts, strict=True)], dim=1)
        y[rows] = (y[rows].to(wide) + delta).to(y.dtype)
