"""HostBlocks: host memory for the content of KV blocks, and the copies between it and the device.

A step's copies are gathered on the device into a staging buffer, or scattered from it, and cross to the host and back in
runs of adjacent slots. On a GPU they have a stream of their own, ordered by events: what is copied out was written by the
steps before, is gathered before this step may overwrite it, and crosses while it computes; what is copied back is in its
blocks before this step computes. Captured graphs know nothing of all this.

Boundary: bytes. Which block goes where is the plan's (``engine.plan.BlockCopies``), decided by ``engine.cache.host_tier``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.errors import OutOfMemoryError
from engine.models.decoder import LayerCache
from engine.plan import NO_COPIES, BlockCopies, Int32

STAGING_BYTES = 64 << 20  # blocks that are copied at once; more take turns
AS_INTEGERS = {
    1: torch.uint8,
    2: torch.int16,
    4: torch.int32,
    8: torch.int64,
}  # not every dtype can be gathered


@dataclass(frozen=True, slots=True)
class _Run:
    """Adjacent slots: those from `slot` on belong to the staging buffer's places [first, end)."""

    first: int
    end: int
    slot: int


class _Part:
    """One tensor of the cache, block by block, with its host memory and its share of the staging buffer."""

    __slots__ = ("blocks", "host", "staging")

    def __init__(self, blocks: Tensor, num_slots: int, num_staged: int) -> None:
        self.blocks = blocks.view(AS_INTEGERS[blocks.itemsize])
        shape, dtype = blocks.shape[1:], self.blocks.dtype
        self.host = torch.empty(num_slots, *shape, dtype=dtype)
        self.staging = torch.empty(num_staged, *shape, dtype=dtype, device=blocks.device)


class HostBlocks:
    """`num_slots` blocks in host memory, each all that the device's cache holds of one block.

    Args:
        parts: the tensors of the device's cache, block by block: each [num_blocks, …], contiguous or not (`by_block`).

    Raises:
        OutOfMemoryError: beside a GPU: the system does not let so much memory be pinned.
    """

    def __init__(
        self, num_slots: int, parts: Sequence[Tensor], *, staging_bytes: int = STAGING_BYTES
    ) -> None:
        block_bytes = sum(part[0].nbytes for part in parts)
        self._num_staged = min(num_slots, max(1, staging_bytes // block_bytes))
        self._parts = [_Part(part, num_slots, self._num_staged) for part in parts]
        self._device = parts[0].device
        self._stream: torch.cuda.Stream | None = None
        if self._device.type == "cuda":
            for part in self._parts:
                _pin(part.host)
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def copy(self, copies: BlockCopies) -> None:
        """Start the copies, between the steps launched so far and what is launched from now on."""
        if copies is NO_COPIES:
            return
        if self._stream is None:
            self._save(copies.out)
            self._load(copies.back)
            return
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                done = self._save(copies.out)
                if len(copies.back):
                    self._load(copies.back)
                    done = self._stream.record_event()
        except Exception:
            # What was started must not write to blocks that are somebody else's by then.
            current.wait_stream(self._stream)
            raise
        if done is not None:
            current.wait_event(done)

    def close(self) -> None:
        """Wait for copies under way, and give the host's memory back. The caches may go after that."""
        if self._stream is not None:
            self._stream.synchronize()
            for part in self._parts:
                torch.cuda.cudart().cudaHostUnregister(part.host.data_ptr())  # type: ignore[no-untyped-call]
        self._parts = []

    def _save(self, pairs: Int32) -> torch.cuda.Event | None:
        """Blocks to slots. The event: the blocks have been read."""
        gathered = None
        for blocks, slots in self._pieces(pairs[:, 1], pairs[:, 0]):
            index = self._index(blocks)
            for part in self._parts:
                torch.index_select(part.blocks, 0, index, out=part.staging[: len(slots)])
            if self._stream is not None:
                gathered = self._stream.record_event()
            for run in _runs(slots):
                for part in self._parts:
                    host = part.host[run.slot : run.slot + run.end - run.first]
                    host.copy_(part.staging[run.first : run.end], non_blocking=True)
        return gathered

    def _load(self, pairs: Int32) -> None:
        """Slots to blocks."""
        for blocks, slots in self._pieces(pairs[:, 0], pairs[:, 1]):
            for run in _runs(slots):
                for part in self._parts:
                    host = part.host[run.slot : run.slot + run.end - run.first]
                    part.staging[run.first : run.end].copy_(host, non_blocking=True)
            index = self._index(blocks)
            for part in self._parts:
                part.blocks.index_copy_(0, index, part.staging[: len(slots)])

    def _pieces(self, slots: Int32, blocks: Int32) -> Iterator[tuple[Int32, Int32]]:
        """(blocks, slots) by ascending slot, in pieces that the staging buffer holds."""
        order, size = np.argsort(slots, kind="stable"), self._num_staged
        for begin in range(0, len(order), size):
            piece = order[begin : begin + size]
            yield blocks[piece], slots[piece]

    def _index(self, blocks: Int32) -> Tensor:
        index = torch.from_numpy(blocks.astype(np.int64))
        if self._stream is not None:
            return index.pin_memory().to(self._device, non_blocking=True)
        return index


def by_block(caches: list[LayerCache]) -> list[Tensor]:
    """What the caches hold, block by block: views of K and V of all layers, [num_blocks, L, 2, K, block_size, D], and of the
    scales of int8. Those of fp8 are the same for all blocks."""
    first, last = caches[0], caches[-1]
    parts = [_by_block(first.k, last.v, len(caches))]
    if first.k_scale is not None and last.v_scale is not None and first.k.dtype == torch.int8:
        parts.append(_by_block(first.k_scale, last.v_scale, len(caches)))
    return parts


def _by_block(first: Tensor, last: Tensor, num_layers: int) -> Tensor:
    """[num_blocks, L, 2, …] of the 2 L tensors [num_blocks, …] that lie one behind the other from `first` to `last`."""
    num_blocks, *block = first.shape
    half, cell = first.numel(), first[0].numel()
    view = first.as_strided(
        (num_blocks, num_layers, 2, *block),
        (cell, 2 * half, half, *first.stride()[1:]),
        first.storage_offset(),
    )
    assert view[0, -1, 1].data_ptr() == last.data_ptr(), "the layers' caches do not lie one behind the other"
    return view


def _runs(slots: Int32) -> Iterator[_Run]:
    """Runs of adjacent slots among ascending ones."""
    ends = [*(np.flatnonzero(np.diff(slots) != 1) + 1).tolist(), len(slots)]
    first = 0
    for end in ends:
        yield _Run(first, end, int(slots[first]))
        first = end


def _pin(memory: Tensor) -> None:
    """Lock memory in place, so that copies from and to it do not wait. torch's own pinned memory comes in powers of two."""
    error = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)  # type: ignore[no-untyped-call]
    if int(error):
        raise OutOfMemoryError(
            f"{memory.nbytes} bytes of host memory cannot be pinned (CUDA error {int(error)})",
            value=memory.nbytes,
            remedy="Lower swap_space_bytes, or raise the limit of locked memory (ulimit -l).",
            param="swap_space_bytes",
        )
