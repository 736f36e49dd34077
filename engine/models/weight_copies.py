"""WeightCopies: copies of weights from mapped files to their places, by a few threads, piece by piece.

Reading a page of a mapped file and touching a page of fresh memory cost the system more than the copy itself; threads share that.
To a GPU each thread reads its next piece into pinned memory while its last one crosses to the device: the disk (or the page
cache), the host's memory and the bus work at the same time, and the host holds two pieces a thread, whatever the model.

Two threads on a CPU against one copy after another, 1 GB of float16 in the page cache, 2 cores shared with others: to float16
0.38 and 1.44 s, to bfloat16 2.0 and 2.8 s, to float32 0.9 and 2.0 s (medians of three in turn, November 2026).
Boundary: flat copies that convert. Which tensor goes where is ``engine.models.weights``'s.
"""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

# At most: more read no faster from one disk, and a copy to host memory is bound by that memory.
NUM_THREADS = 4
PIECE_BYTES = 16 << 20  # a power of two, which torch's allocator of pinned memory rounds up to
AHEAD = 4  # pieces a thread that may wait for it


class WeightCopies:
    """``with WeightCopies(device) as copies``: copies asked for are done when the block ends.

    Raises, there or from a later `copy`, what the first copy that failed raised.
    """

    def __init__(
        self, device: torch.device, *, num_threads: int | None = None, piece_bytes: int = PIECE_BYTES
    ) -> None:
        num_threads = num_threads or max(1, min(NUM_THREADS, torch.get_num_threads()))
        self._piece_bytes = piece_bytes
        self._most = AHEAD * num_threads
        self._waiting: deque[Future[None]] = deque()
        self._lanes = threading.local()
        self._device = device
        self._is_inference = torch.is_inference_mode_enabled()  # a thread has its own
        self._pool = ThreadPoolExecutor(num_threads, "weights")

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Start to fill `target`, contiguous on the device, from `source` on the host, of as many values."""
        size = max(1, self._piece_bytes // source.element_size())
        pieces = zip(torch.split(source.reshape(-1), size), torch.split(target.view(-1), size), strict=True)
        for piece, place in pieces:
            while len(self._waiting) >= self._most:
                self._waiting.popleft().result()
            self._waiting.append(self._pool.submit(self._put, piece, place))

    def _put(self, piece: Tensor, place: Tensor) -> None:
        with torch.inference_mode(self._is_inference):
            if self._device.type != "cuda":
                place.copy_(piece)
                return
            lane = getattr(self._lanes, "lane", None)
            if lane is None:
                lane = self._lanes.lane = _Lane(self._device, self._piece_bytes)
            lane.put(piece, place)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=error is not None)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        if error is None:
            for done in self._waiting:
                done.result()


class _Lane:
    """One thread's way to a GPU: two pieces of pinned memory that take turns, and a stream."""

    def __init__(self, device: torch.device, piece_bytes: int) -> None:
        self._device = device
        self._memory = torch.empty(2, piece_bytes, dtype=torch.uint8, pin_memory=True)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(
            torch.cuda.default_stream(device)
        )  # the places may be memory still in use there
        self._crossed: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def put(self, piece: Tensor, place: Tensor) -> None:
        self._turn = turn = 1 - self._turn
        last = self._crossed[turn]
        if last is not None:
            last.synchronize()
        staged = self._memory[turn][: piece.nbytes].view(piece.dtype)
        staged.copy_(piece)
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            # Converted there: a copy that converts would do so here, into memory that is not pinned.
            place.copy_(staged if piece.dtype == place.dtype else staged.to(self._device, non_blocking=True), non_blocking=True)  # fmt: skip
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        self._crossed[turn] = event
