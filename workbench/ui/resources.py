"""What pages share: the host, the conversations and the step columns, given once by the app's lifespan.

Streamlit runs a page from its path and passes it nothing, so this one seam holds what the composition root made. Pages
read `host()`, `conversations()` and `columns(worker)`; nothing else here is state.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from workbench.ui.conversations import Conversations
from workbench.ui.step_columns import StepColumns

if TYPE_CHECKING:
    from engine.worker import EngineWorker
    from workbench.host import EngineHost


@dataclass(slots=True)
class _Provided:
    """The holder. Written by `provide` alone."""

    host: EngineHost | None = None
    conversations: Conversations = field(default_factory=Conversations)
    columns: weakref.WeakKeyDictionary[EngineWorker, StepColumns] = field(
        default_factory=weakref.WeakKeyDictionary
    )
    lock: threading.Lock = field(default_factory=threading.Lock)


_provided = _Provided()


def provide(host: EngineHost | None) -> None:
    """Make `host` the one that pages see; conversations and columns of an earlier one are dropped. None takes it away."""
    _provided.conversations.close()
    _provided.host = host
    _provided.conversations = Conversations()
    _provided.columns = weakref.WeakKeyDictionary()


def host() -> EngineHost:
    """The host. Raises RuntimeError when no app has provided one."""
    if _provided.host is None:
        raise RuntimeError("no engine host: pages run inside the app (`quire up` or `quire serve`)")
    return _provided.host


def conversations() -> Conversations:
    return _provided.conversations


def columns(worker: EngineWorker) -> StepColumns:
    """The step columns of a worker, one set for all sessions."""
    with _provided.lock:
        found = _provided.columns.get(worker)
        if found is None:
            found = StepColumns(worker.records, worker.config.record_seconds)
            _provided.columns[worker] = found
        return found
