"""StepClock: how long the parts of a step took, on a GPU without waiting for any of them.

Boundary: marks and differences; what the parts are is the runner's.
"""

from __future__ import annotations

import time

import torch


class StepClock:
    """Marks between the parts of a step: device events on a GPU, the host's clock on a CPU (where work has been done)."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[torch.cuda.Event | float] = []
        self._made = time.perf_counter()
        self.prepare_ms = 0.0  # of the host, until the device's first work

    def begin(self) -> None:
        """The first mark: what was prepared goes to the device. Made already, it stays."""
        if not self._marks:
            self.prepare_ms = (time.perf_counter() - self._made) * 1e3
            self.mark()

    def mark(self) -> None:
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def wait(self) -> None:
        last = self._marks[-1]
        if isinstance(last, torch.cuda.Event):
            last.synchronize()

    def elapsed_ms(self, part: int) -> float:
        first, second = self._marks[part], self._marks[part + 1]
        if isinstance(first, torch.cuda.Event) and isinstance(second, torch.cuda.Event):
            return float(first.elapsed_time(second))
        assert isinstance(first, float)
        assert isinstance(second, float)
        return (second - first) * 1e3
