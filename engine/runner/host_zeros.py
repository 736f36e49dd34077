"""Zeros in the host's memory that take neither time nor memory until they are written.

``torch.zeros`` writes every byte: half a second a GiB on the way to the first token, and a process that holds a KV cache in
which nothing is. Here the system hands out zeroed pages as they are touched, large ones where it has them: half the time of
a first write over small pages, and the memory goes back whole with the last view of it.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor


def host_zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor of zeros, aligned to pages. Not shared with child processes that write to it."""
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(*shape)
