"""Rotary position embedding: frequencies of each supported kind, and the table of cosines and sines.

Frequencies and angles are computed in float32 whatever the model's dtype, because the checkpoints were trained with
float32 angles: at position 100,000 a float64 angle differs by 6e-3 from the one that the model knows.
LongRoPE has two sets of frequencies, for contexts up to that of pre-training and for longer ones. Keys are cached as they were
turned, so one engine has one set for all its requests: the table's length, its longest context, decides. For short texts alone
an engine with `max_model_len` of at most the original context computes what the short set gives.
Source: "RoFormer" (Su et al. 2021); linear scaling (Chen et al. 2023); YaRN (Peng et al. 2023), section 3.2 and 3.4;
LongRoPE (Ding et al. 2024) as Phi-3 has it; Llama 3.1 reference implementation for "llama3".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.models.rope_config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_size: int, num_positions: int) -> Tensor:
    """Radians per position of each of the D/2 pairs, float32 [D / 2] on the CPU, for contexts of up to `num_positions`."""
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32) / head_size
    wavelengths = torch.pow(rope.theta, exponents)  # in positions, over 2 pi
    if rope.kind == "linear":
        return 1.0 / wavelengths / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, 1.0 / wavelengths)
    if rope.kind == "yarn":
        return _yarn(rope, wavelengths, head_size)
    if rope.kind == "longrope":
        factors = rope.long_factor if num_positions > rope.original_max_position else rope.short_factor
        return 1.0 / (torch.tensor(factors, dtype=torch.float32) * wavelengths)
    return 1.0 / wavelengths


def attention_factor(rope: RopeConfig) -> float:
    """Scale of the cosines and sines; it stands for a temperature of the attention scores. 1 but for YaRN and LongRoPE."""
    if rope.kind not in ("yarn", "longrope"):
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.kind == "longrope":
        return (
            1.0
            if rope.factor <= 1.0
            else math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_position))
        )
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor, 1.0)


def rotary_table(rope: RopeConfig, head_size: int, num_positions: int, dtype: torch.dtype) -> Tensor:
    """Cosines and sines by position: [num_positions, D], the first D/2 columns cosines, the others sines.

    `head_size` D: the values of a head that are turned.
    """
    positions = torch.arange(num_positions, dtype=torch.float32)
    angles = torch.outer(positions, inverse_frequencies(rope, head_size, num_positions))
    table = torch.cat((angles.cos(), angles.sin()), dim=-1)
    return (table * attention_factor(rope)).to(dtype)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0


def _llama3(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """Slow pairs are divided by the factor, fast ones kept, those between blended by wavelength."""
    length = rope.original_max_position
    wavelengths = 2 * math.pi / frequencies
    blend = (length / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - blend) * frequencies / rope.factor + blend * frequencies
    slow = wavelengths > length / rope.low_freq_factor
    fast = wavelengths < length / rope.high_freq_factor
    return torch.where(slow, frequencies / rope.factor, torch.where(fast, frequencies, blended))


def _yarn(rope: RopeConfig, wavelengths: Tensor, head_size: int) -> Tensor:
    """Interpolated below `beta_slow` rotations over the trained context, kept above `beta_fast`, a ramp between."""

    def pair_of(rotations: float) -> float:
        turns = rope.original_max_position / (rotations * 2 * math.pi)
        return head_size * math.log(turns) / (2 * math.log(rope.theta))

    low, high = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_size - 1)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(head_size // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (rope.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept
