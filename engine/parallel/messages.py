"""What rank 0 says to the other ranks of its engine, and what they answer; all of it is pickled.

A step has no answer: what it computed is in the collectives. Everything else is answered by `Done` or `Failed`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from engine.config import EngineConfig
from engine.errors import EngineError
from engine.plan import StepPlan
from engine.sampling_params import SamplingParams

CHOOSES_NOTHING = SamplingParams()


@dataclass(frozen=True, slots=True)
class Start:
    """Load this rank's part. `asked` is the config as it was asked for, `config` as rank 0 resolved it."""

    rank: int
    asked: EngineConfig
    config: EngineConfig


@dataclass(frozen=True, slots=True)
class Connect:
    """All parts are loaded: meet the others by this file, and make the runner."""

    meeting: Path


@dataclass(frozen=True, slots=True)
class Sleep:
    """Level 0: wake up."""

    level: int


@dataclass(frozen=True, slots=True)
class Reset:
    """Forget all rows."""


@dataclass(frozen=True, slots=True)
class Done:
    """It was done."""


@dataclass(frozen=True, slots=True)
class Failed:
    """It was not; the rank goes on only where it was to sleep or wake up."""

    error: EngineError


def for_followers(plan: StepPlan) -> StepPlan:
    """The plan without what only choosing needs: rank 0 chooses for all."""
    if not plan.admitted:
        return plan
    rows = tuple(replace(each, params=CHOOSES_NOTHING, grammar=None) for each in plan.admitted)
    return replace(plan, admitted=rows)
