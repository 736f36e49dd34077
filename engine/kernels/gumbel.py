"""Gumbel noise of (seed, position, token id) in torch's operations, and the constants that every device's form shares.

The formula stands in `engine.runner.sampler`; `engine.kernels.sampling` holds Triton's form. Integers are the same
everywhere; the two logarithms are rounded as each device does, so noise (-2.9 to 23) differs in its last places.
Boundary: noise only, no Triton; what is added to what decides the sampler.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels.invariant import in_pieces

MIN_TEMPERATURE = 1e-5  # below it logits / temperature may overflow; the choice is the greedy one long before
MULTIPLIER_A = 0x7FEB352D
MULTIPLIER_B = 0x846CA68B
SEED_OFFSET = 0x9E3779B9
POSITION_OFFSET = 0x85EBCA6B
LARGEST_U = 1.0 - 2.0**-24


def mix32(x: Tensor) -> Tensor:
    """The 32-bit mixer on int32 values; the masks make torch's signed shifts logical ones."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * MULTIPLIER_A
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * (MULTIPLIER_B - (1 << 32))  # as a signed 32-bit number
    return x ^ ((x >> 16) & 0xFFFF)


def mix_keys(seed_low: Tensor, seed_high: Tensor, positions: Tensor) -> Tensor:
    """The two keys [2, n] of rows with these halves of a seed and these positions, all int32 [n]."""
    mixed = mix32(seed_low + (SEED_OFFSET - (1 << 32)))
    at = mix32(positions + (POSITION_OFFSET - (1 << 32)))
    return torch.stack((mix32(mixed ^ positions), mix32(mix32(seed_high ^ mixed) ^ at)))


def gumbel_noise(keys: Tensor, token_ids: Tensor, dtype: torch.dtype, *, invariant: bool = False) -> Tensor:
    """Gumbel noise [L, n] of the tokens (int32, [n] or [L, n]) under the rows' keys [2, L]."""
    hashed = mix32(mix32(token_ids ^ keys[0][:, None]) + keys[1][:, None])
    u = ((hashed.long() & 0xFFFFFFFF).to(dtype) + 0.5) * 2.0**-32
    u = u.clamp_(max=LARGEST_U)
    if invariant:
        return in_pieces(lambda x: torch.log(torch.log1p(x.neg()).neg()).neg(), u)
    return u.neg_().log1p_().neg_().log_().neg_()
