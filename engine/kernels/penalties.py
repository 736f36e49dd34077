"""Penalties of tokens that were there: the marks that a row keeps of its tokens, and what they do to logits, in torch.

A mark is an int16 for each token id: bit 0 says that the prompt has it, the bits above count it in the output, up to 16383.
Boundary: definitions that all devices share. ``engine.kernels.logit_controls`` is the form of devices, ``cpu_sampler.cpp``
that of CPUs.
"""

from __future__ import annotations

import torch
from torch import Tensor

IN_PROMPT = 1
ONE_OUTPUT = 2
FULL = 32766  # a mark from which on an output is no longer counted


def penalized(
    logits: Tensor, marks: Tensor, repetition: Tensor, frequency: Tensor, presence: Tensor
) -> Tensor:
    """Logits [n, V] under their rows' marks [n, V] and penalties [n, 1]; vLLM's formulas, in the logits' type."""
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    count = (marks >> 1).to(logits.dtype)
    found = torch.where(marks != 0, repeated, logits) - frequency * count
    return torch.where(count > 0, found - presence, found)
