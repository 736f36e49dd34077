"""What an EngineHost tells about itself and its models: phases, residents, followed aliases. Values only."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from workbench.load_options import PLAIN, LoadOptions
from workbench.model_card import ModelCard

if TYPE_CHECKING:
    from engine.config import EngineConfig
    from engine.errors import EngineError
    from workbench.errors import WorkbenchError


class HostPhase(str, Enum):
    IDLE = "idle"  # start() was not called
    LOADING = "loading"
    READY = "ready"
    SLEEPING = "sleeping"  # gave its device memory back, or will when its running requests have ended; takes no new ones
    DRAINING = "draining"  # takes no new requests; closes when its running ones have ended
    FAILED = "failed"  # the load failed, or the engine died later; `error` says why
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class HostState:
    """How far the host, or one of its models, is. `fraction` of the load is between 0 and 1; `error` has a remedy."""

    phase: HostPhase
    message: str = ""
    fraction: float = 0.0
    error: EngineError | WorkbenchError | None = None

    @property
    def ready(self) -> bool:
        return self.phase is HostPhase.READY

    @property
    def loaded(self) -> bool:
        """Ready, or asleep."""
        return self.phase in (HostPhase.READY, HostPhase.SLEEPING)


@dataclass(frozen=True, slots=True)
class Resident:
    """One model in memory, or on its way there or out."""

    id: str  # what a request's `model` says: ``NAME/VERSION`` of a registered version, else the folder's name
    ref: str  # as it was asked for: a folder, a hub id, NAME/3, NAME@alias
    card: ModelCard | None  # None until its files were read
    state: HostState
    deterministic: bool
    is_default: bool  # answers requests that name no model
    digest: str  # content identity; "" while unknown
    name: str | None = None  # in the registry; None for a folder or hub id
    version: int | None = None
    aliases: tuple[str, ...] = ()  # ``NAME@alias`` that lead here now
    followed: bool = False  # stays because a followed alias names it
    memory_bytes: int | None = (
        None  # weights, KV cache and workspace; of an adapter its weights in host memory
    )
    parent: str | None = None  # id of the resident whose engine serves it: it is an adapter there
    task: str = "generate"  # what it is for: ``engine.pooling.ModelPooling.task``
    merged_because: str = ""  # why an adapter was merged into weights of its own instead
    options: LoadOptions = PLAIN  # what was asked for of its engine alone
    config: EngineConfig | None = (
        None  # its engine's, with every automatic value resolved; None until it is built
    )
    adapters: tuple[str, ...] = ()  # ids of the residents that its engine serves beside it


@dataclass(frozen=True, slots=True)
class Followed:
    """An alias that the host follows. While the two versions differ, the newer one is being loaded, or `error` says why not."""

    ref: str  # NAME@alias
    registry_version: int | None  # what the registry said last; None: no such alias, or never asked
    serving_version: int | None  # what answers requests to `ref` now; None: nothing yet
    error: str | None = None
