"""Ranks: what the processes of one tensor-parallel engine compute together: sums, and the tokens that rank 0 chose.

A process group of its own, found through a file that both sides know: several engines of a process, and whatever else uses
torch.distributed there, do not meet. NCCL between GPUs; gloo between CPU processes, over the loopback interface alone.

Boundary: tensors of steps. Who starts and watches the processes: ``engine.parallel.processes``.
"""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from engine.models.shard import Shard

dist: Any = torch.distributed  # its types do not name all of it


class Ranks:
    """One rank's end. `connect` before the first collective; all ranks call the same ones in the same order.

    `timeout_s`: how long a CPU's collective waits for the other ranks.
    """

    def __init__(self, shard: Shard, device: torch.device, *, timeout_s: float) -> None:
        self.shard = shard
        self._device = device
        self._timeout = timedelta(seconds=timeout_s)
        self._group: Any = None

    @property
    def rank(self) -> int:
        return self.shard.rank

    def connect(self, meeting: Path) -> None:
        """Meet the other ranks, which name the same new file; waits for them.

        Raises:
            RuntimeError: they did not come in time.
        """
        store = dist.FileStore(str(meeting), self.shard.size)
        if self._device.type == "cuda":
            with torch.cuda.device(self._device):
                self._group = dist.ProcessGroupNCCL(
                    store, self.rank, self.shard.size, dist.ProcessGroupNCCL.Options()
                )
            return
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout = self._timeout
        self._group = dist.ProcessGroupGloo(store, self.rank, self.shard.size, options)

    def all_reduce(self, x: Tensor) -> Tensor:
        """`x`, now the sum over all ranks, with the same bits on each. On a GPU nothing waits but the stream."""
        self._group.allreduce([x]).wait()
        return x

    def from_first(self, x: Tensor) -> Tensor:
        """`x`, now with rank 0's values."""
        self._group.broadcast([x], dist.BroadcastOptions()).wait()  # its root is rank 0
        return x

    def smallest(self, value: int) -> int:
        """The smallest of all ranks' values."""
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MIN
        values = torch.tensor([value], device=self._device)
        self._group.allreduce([values], options).wait()
        return int(values)

    def abort(self) -> None:
        """Have collectives that wait for a rank that is gone fail. Safe to call from any thread."""
        group = self._group
        if group is not None and self._device.type == "cuda":  # gloo sees a closed connection by itself
            with suppress(RuntimeError):
                group.abort()

    def close(self) -> None:
        """Leave the group. A second call does nothing."""
        group, self._group = self._group, None
        if group is not None:
            with suppress(RuntimeError):
                group.shutdown()
