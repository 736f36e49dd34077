"""ParkedWeights: a decoder's weights in host memory while its engine sleeps, and their place on the device empty.

The tensors stay what they are, so that every view of them is whole again after `restore`; their addresses are other ones
then, and work that was captured with the old ones has to be captured again.

Boundary: the tensors of a torch module. When to park is ``engine.runner.model_runner``'s decision.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, UntypedStorage, nn

CHUNK_BYTES = 256 << 20  # a power of two: torch's allocator of pinned memory rounds up to one


def storages_of(module: nn.Module) -> list[UntypedStorage]:
    """The memory of all parameters, buffers and other tensors of a module, each once: tied weights and views share one."""
    found: dict[int, UntypedStorage] = {}
    for part in module.modules():
        for value in (*part.parameters(recurse=False), *part.buffers(recurse=False), *vars(part).values()):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                found[storage.data_ptr()] = storage
    return list(found.values())


class ParkedWeights:
    """Takes the weights off the device when it is made, by copies to pinned memory where that is a GPU."""

    def __init__(self, module: nn.Module) -> None:
        self._storages = storages_of(module)
        self._sizes = [storage.nbytes() for storage in self._storages]
        is_pinned = any(storage.device.type == "cuda" for storage in self._storages)
        left = sum(self._sizes)
        self._chunks: list[Tensor] = []
        while left > 0:
            self._chunks.append(torch.empty(min(CHUNK_BYTES, left), dtype=torch.uint8, pin_memory=is_pinned))
            left -= CHUNK_BYTES
        for host, device in self._pieces():
            host.copy_(device, non_blocking=True)
        self._wait()
        for storage in self._storages:
            storage.resize_(0)

    @property
    def num_bytes(self) -> int:
        """Host memory that the weights take."""
        return sum(chunk.nbytes for chunk in self._chunks)

    def restore(self) -> None:
        """Put the weights back on the device and give the host's memory back.

        Raises:
            torch.OutOfMemoryError: the device does not have the bytes any more; they stay parked.
        """
        try:
            for storage, size in zip(self._storages, self._sizes, strict=True):
                storage.resize_(size)
        except torch.OutOfMemoryError:
            for storage in self._storages:
                storage.resize_(0)
            raise
        for host, device in self._pieces():
            device.copy_(host, non_blocking=True)
        self._wait()
        self._chunks.clear()

    def _pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Views of the host's chunks and of the storages, in the same order."""
        chunks = iter(self._chunks)
        host = torch.empty(0, dtype=torch.uint8)
        for storage in self._storages:
            device = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            while len(device):
                if not len(host):
                    host = next(chunks)
                size = min(len(host), len(device))
                yield host[:size], device[:size]
                host, device = host[size:], device[size:]

    def _wait(self) -> None:
        for device in {storage.device for storage in self._storages if storage.device.type == "cuda"}:
            torch.cuda.synchronize(device)
