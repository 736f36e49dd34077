"""HostBlocks: host memory for the content of KV blocks, and the copies between it and the device.

A step's copies are gathered on the device into a staging buffer, or scattered from it, and cross to the host and back in
runs of adjacent slots. On a GPU they have a stream of their own, ordered by events: what is copied out was written by the
steps before, is gathered before this step may overwrite it, and crosses while it computes; what is copied back is in its
blocks before this step computes. Captured graphs know nothing of all this.

Boundary: bytes. Which block goes where is the plan's (``engine.plan.BlockCopies``), decided by ``engine.cache.host_tier``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.errors import OutOfMemoryError
from engine.models.decoder import LayerCache
from engine.plan import NO_COPIES, BlockCopies, Int32

STAGING_BYTES = 64 << 20  # blocks that are copied at once; more take turns


@dataclass(frozen=True, slots=True)
class _Run:
    """Adjacent slots: those from `slot` on belong to the staging buffer's places [first, end)."""

    first: int
    end: int
    slot: int


class HostBlocks:
    """`num_slots` blocks in host memory, each all layers' K and V of one device block.

    Args:
        blocks: the device's KV cache, block by block: [num_blocks, …], contiguous or not (`by_block`).

    Raises:
        OutOfMemoryError: beside a GPU: the system does not let so much memory be pinned.
    """

    def __init__(self, num_slots: int, blocks: Tensor, *, staging_bytes: int = STAGING_BYTES) -> None:
        shape, device = blocks.shape[1:], blocks.device
        num_staged = min(num_slots, max(1, staging_bytes // (shape.numel() * blocks.itemsize)))
        self._blocks = blocks
        self._host = torch.empty(num_slots, *shape, dtype=blocks.dtype)
        self._staging = torch.empty(num_staged, *shape, dtype=blocks.dtype, device=device)
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            _pin(self._host)
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(self, copies: BlockCopies) -> None:
        """Start the copies, between the steps launched so far and what is launched from now on."""
        if copies is NO_COPIES:
            return
        if self._stream is None:
            self._save(copies.out)
            self._load(copies.back)
            return
        current = torch.cuda.current_stream(self._blocks.device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                done = self._save(copies.out)
                if len(copies.back):
                    self._load(copies.back)
                    done = self._stream.record_event()
        except Exception:
            current.wait_stream(
                self._stream
            )  # what was started must not write to blocks that are somebody else's by then
            raise
        if done is not None:
            current.wait_event(done)

    def close(self) -> None:
        """Wait for copies under way, and give the host's memory back. The caches may go after that."""
        if self._stream is not None:
            self._stream.synchronize()
            torch.cuda.cudart().cudaHostUnregister(self._host.data_ptr())  # type: ignore[no-untyped-call]
        del self._host, self._staging, self._blocks

    def _save(self, pairs: Int32) -> torch.cuda.Event | None:
        """Blocks to slots. The event: the blocks have been read."""
        gathered = None
        for blocks, slots in self._pieces(pairs[:, 1], pairs[:, 0]):
            staged = self._staging[: len(slots)]
            torch.index_select(self._blocks, 0, self._index(blocks), out=staged)
            if self._stream is not None:
                gathered = self._stream.record_event()
            for run in _runs(slots):
                host = self._host[run.slot : run.slot + run.end - run.first]
                host.copy_(staged[run.first : run.end], non_blocking=True)
        return gathered

    def _load(self, pairs: Int32) -> None:
        """Slots to blocks."""
        for blocks, slots in self._pieces(pairs[:, 0], pairs[:, 1]):
            staged = self._staging[: len(slots)]
            for run in _runs(slots):
                host = self._host[run.slot : run.slot + run.end - run.first]
                staged[run.first : run.end].copy_(host, non_blocking=True)
            self._blocks.index_copy_(0, self._index(blocks), staged)

    def _pieces(self, slots: Int32, blocks: Int32) -> Iterator[tuple[Int32, Int32]]:
        """(blocks, slots) by ascending slot, in pieces that the staging buffer holds."""
        order, size = np.argsort(slots, kind="stable"), len(self._staging)
        for begin in range(0, len(order), size):
            piece = order[begin : begin + size]
            yield blocks[piece], slots[piece]

    def _index(self, blocks: Int32) -> Tensor:
        index = torch.from_numpy(blocks.astype(np.int64))
        if self._stream is not None:
            return index.pin_memory().to(self._blocks.device, non_blocking=True)
        return index


def by_block(caches: list[LayerCache]) -> Tensor:
    """The KV cache of all layers as [num_blocks, L, 2, K, block_size, D]: a view, as they lie in one allocation."""
    first, last = caches[0].k, caches[-1].v
    num_blocks, *block = first.shape
    half, cell = first.numel(), first[0].numel()
    view = first.as_strided(
        (num_blocks, len(caches), 2, *block),
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
