"""LoRA adapters of one engine: which are loaded, by which name, and who still uses one that was removed.

An adapter's identity is its content digest, and an engine gives a number once: a name that is loaded again with other
weights is another adapter. Removing one takes its name at once; requests that carry it run to their end, and with the
last of them its weights go.

Boundary: names and counts, no torch. The weights are a LoraStore's; which adapters share a batch is
``engine.lora_queue``'s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from engine.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class Lora:
    """One loaded adapter."""

    name: str
    digest: str  # of its files; part of every prefix-cache key of its requests
    lora_id: int  # no other adapter of this engine ever has it
    rank: int  # the largest of its modules
    num_bytes: int  # of host memory


class LoraWeights(Protocol):
    """An adapter that was read and checked, ready to be added."""

    @property
    def digest(self) -> str: ...
    @property
    def rank(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...


class LoraStore(Protocol):
    """Holds the weights of all loaded adapters for the runner."""

    def read(self, folder: Path) -> LoraWeights:
        """Read an adapter's files and check them against the model. Changes nothing; safe to call from any thread.

        Raises:
            ModelLoadError: the adapter cannot be loaded on this model.
            OutOfMemoryError: the host has fewer bytes.
        """
        ...

    def add(self, lora_id: int, weights: Any) -> None:
        """Hold what `read` gave."""
        ...

    def remove(self, lora_id: int) -> None:
        """Let the weights go; no row uses them any more."""
        ...


class LoraRegistry:
    """The adapters of an engine. `store` None: an engine without adapters. `get` is safe to call from any thread.

    `num_live`: how many live requests carry an adapter.
    """

    def __init__(self, store: LoraStore | None, num_live: Callable[[int], int]) -> None:
        self._store = store
        self._num_live = num_live
        self._by_name: dict[str, Lora] = {}
        self._retired: list[Lora] = []  # removed, and still carried by live requests
        self._next_id = 1

    @property
    def loaded(self) -> tuple[Lora, ...]:
        """Those that requests may name, oldest first."""
        return tuple(self._by_name.values())

    def get(self, name: str) -> Lora:
        """The adapter of that name.

        Raises:
            InvalidRequestError: none is loaded under it.
        """
        self._require_store()
        found = self._by_name.get(name)
        if found is None:
            raise InvalidRequestError(
                f"no adapter {name!r} is loaded",
                value=name,
                limit=[lora.name for lora in self.loaded],
                remedy="Load it with add_lora, or name one that is loaded.",
                param="lora",
            )
        return found

    def is_loaded(self, lora: Lora) -> bool:
        """Whether this very adapter may be used by a new request."""
        return self._by_name.get(lora.name) is lora

    def read(self, folder: str | Path) -> LoraWeights:
        """Read and check an adapter's files; changes nothing. Safe to call from any thread.

        Raises:
            InvalidRequestError: the engine has no adapters.
            ModelLoadError, OutOfMemoryError: as `LoraStore.read`.
        """
        return self._require_store().read(Path(folder))

    def add(self, name: str, weights: LoraWeights) -> Lora:
        """Load an adapter that was read.

        Raises:
            InvalidRequestError: the name is empty or in use.
        """
        store = self._require_store()
        if not name or name in self._by_name:
            raise InvalidRequestError(
                f"adapter name {name!r} is in use" if name else "an adapter needs a name",
                value=name,
                remedy="Remove that adapter first, or choose another name.",
                param="lora",
            )
        lora = Lora(name, weights.digest, self._next_id, weights.rank, weights.num_bytes)
        store.add(lora.lora_id, weights)
        self._next_id += 1
        self._by_name[name] = lora
        return lora

    def remove(self, name: str) -> None:
        """Take an adapter's name; its weights go when no live request carries it any more.

        Raises:
            InvalidRequestError: none is loaded under that name.
        """
        self._retired.append(self.get(name))
        del self._by_name[name]
        self.let_go()

    def let_go(self) -> None:
        """Give back the weights of removed adapters that nobody carries any more."""
        if not self._retired:
            return
        store, kept = self._require_store(), []
        for lora in self._retired:
            if self._num_live(lora.lora_id):
                kept.append(lora)
            else:
                store.remove(lora.lora_id)
        self._retired = kept

    def _require_store(self) -> LoraStore:
        if self._store is None:
            raise InvalidRequestError(
                "this engine takes no adapters",
                value=False,
                limit=True,
                remedy="Build it with enable_lora=True.",
                param="lora",
            )
        return self._store
