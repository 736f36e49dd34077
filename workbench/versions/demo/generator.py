"""The project's own task generator: one seed, one split, an endless stream of episodes.

It mixes the families of `questions`, `tool_use` and `copying`. Stories with required words come from
dialogue data (see `corpus`); turning a message into a JSON record is left out on purpose: that family is
for fine-tunes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from enum import Enum

from workbench.versions.demo.copying import copying_episode, repeating_episode
from workbench.versions.demo.questions import question_episode
from workbench.versions.demo.tasks import Episode, Task
from workbench.versions.demo.tool_use import tool_episode
from workbench.versions.demo.values import Split

FAMILIES = (
    "cited_answer", "not_in_context", "tool_call", "tool_answer", "no_tool",
    "copy", "spell", "count", "pick", "sentence", "identity",
)  # fmt: skip
LONG_SHARE = 0.03
"""Share of question episodes with 16 to 40 passages, so that contexts beyond 1,000 tokens are seen."""


PRACTICE_SHARE = 0.2
"""Share of training episodes in the full stage that only repeat things, so that copying is not lost again."""


class Stage(Enum):
    """`COPY`: mostly repeating, with few passages and tools, until copying works; `FULL`: everything."""

    COPY = "copy"
    FULL = "full"


def make_episode(seed: int, index: int, split: Split, stage: Stage = Stage.FULL) -> Episode:
    """Episode number `index` of a seed: a function of its arguments alone, so a stream can start anywhere."""
    rng = random.Random(f"{seed}/{split.value}/{index}")
    kind = rng.random()
    if stage is Stage.COPY:
        return _copy_stage(rng, split, kind)
    if split is Split.TRAIN and rng.random() < PRACTICE_SHARE:
        return repeating_episode(rng, split)
    if kind < 0.42:
        long_context = rng.random() < LONG_SHARE and split is Split.TRAIN
        return question_episode(rng, split, rng.randint(16, 40) if long_context else None)
    return tool_episode(rng, split) if kind < 0.7 else copying_episode(rng, split)


def _copy_stage(rng: random.Random, split: Split, kind: float) -> Episode:
    if kind < 0.18:
        return question_episode(rng, split, rng.randint(1, 3))
    return tool_episode(rng, split, max_tools=2) if kind < 0.33 else repeating_episode(rng, split)


def held_out_tasks(seed: int, per_family: int, split: Split = Split.HELD_OUT) -> dict[str, list[Task]]:
    """The first `per_family` tasks of every family of a split, at most one of a family from one episode."""
    found: dict[str, list[Task]] = {family: [] for family in FAMILIES}
    for index in _counter():
        taken: set[str] = set()
        for task in make_episode(seed, index, split).tasks():
            if task.family not in taken and len(found[task.family]) < per_family:
                taken.add(task.family)
                found[task.family].append(task)
        if all(len(tasks) == per_family for tasks in found.values()):
            return found
    raise AssertionError("an endless stream of episodes ended")


def _counter() -> Iterator[int]:
    index = 0
    while True:
        yield index
        index += 1
