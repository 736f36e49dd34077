"""Who answers for a model id: the engine's worker, and what a request to it says besides prompt and parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.worker import EngineWorker
    from workbench.host import EngineHost


@dataclass(frozen=True, slots=True)
class Served:
    """`submit`: further arguments of `EngineWorker.submit`."""

    worker: EngineWorker
    submit: Mapping[str, Any] = field(default_factory=dict)


def served(host: EngineHost, model_id: str) -> Served:
    """Raises UnknownModelError and NotReadyError, as `EngineHost.worker` does."""
    return Served(host.worker(model_id))
