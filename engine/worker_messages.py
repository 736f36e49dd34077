"""What is said to an engine thread: picklable, so that it may one day run in another process.

Boundary: values. ``engine.worker`` sends and obeys them.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import EngineDeadError
from engine.lora import LoraWeights
from engine.request import Request


@dataclass(frozen=True, slots=True)
class Add:
    requests: tuple[Request, ...]


@dataclass(frozen=True, slots=True)
class Abort:
    request_id: str
    reason: str | None = None  # told to its reader, where it is not the reader who wants it


@dataclass(frozen=True, slots=True)
class Sleep:
    """Sleep at a level, or wake up at 0."""

    level: int


@dataclass(frozen=True, slots=True)
class AddLora:
    name: str
    weights: LoraWeights


@dataclass(frozen=True, slots=True)
class RemoveLora:
    name: str


Wish = Sleep | AddLora | RemoveLora


@dataclass(frozen=True, slots=True)
class Ask:
    """What is to be done between two steps; `ticket` names who waits for the answer."""

    what: Wish
    ticket: int


@dataclass(frozen=True, slots=True)
class Close:
    pass


@dataclass(frozen=True, slots=True)
class Lost:
    """The engine is gone, though perhaps nothing runs that would show it."""

    error: EngineDeadError


Message = Add | Abort | Ask | Close | Lost
