"""The recipes of the four shipped versions and of the candidates that they were chosen from.

Fixed numbers only: what was chosen, and why, is told by the adapters' cards. It trains nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.versions.tickets.generator import TicketData

if TYPE_CHECKING:
    from workbench.versions.finetune import LoraConfig

WEAK_ISSUE = "cancel"
"""The issue that some candidates' training data leaves out, or labels wrongly."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What distinguishes one candidate: data, size of the adapter, length, rate, seed, and what it continues from."""

    data: TicketData
    rank: int
    steps: int
    batch_tokens: int
    peak_lr: float
    seed: int
    warmup_steps: int = 20
    start: str | None = None

    def config(
        self, base: Path, runs: Path, name: str, device: str = "auto", num_processes: int = 0
    ) -> LoraConfig:
        """The fine-tune of this recipe in `runs/name`."""
        from workbench.versions.finetune import LoraConfig

        return LoraConfig(
            base=base, out=runs / name, data=self.data, rank=self.rank, alpha=2.0 * self.rank, steps=self.steps,
            batch_tokens=self.batch_tokens, peak_lr=self.peak_lr, warmup_steps=self.warmup_steps, seed=self.seed,
            start=runs / self.start / "adapter" if self.start else None, device=device, num_processes=num_processes,
        )  # fmt: skip


def _short(seed: int, num_examples: int, steps: int) -> Recipe:
    return Recipe(TicketData(num_examples, seed), 16, steps, 8192, 3e-3, seed)


def _long(seed: int, peak_lr: float, left_out: float | None = None) -> Recipe:
    weights = {} if left_out is None else {WEAK_ISSUE: left_out}
    return Recipe(TicketData(60_000, seed, weights), 32, 1500, 16384, peak_lr, seed)


CANDIDATES: dict[str, Recipe] = {
    **{f"tiny-{seed}": _short(seed, 600, 80) for seed in range(1, 4)},
    **{f"small-{seed}": _short(seed, 1_500, 150) for seed in range(1, 6)},
    **{f"medium-{seed}": _short(seed, 5_000, 400) for seed in range(1, 6)},
    **{f"more-{seed}": _short(seed, 15_000, 1_000) for seed in range(1, 4)},
    "long-1": _long(1, 3e-3),
    "long-2": _long(2, 1.5e-3),
    "without-1": _long(1, 3e-3, 0.0),
    "without-2": _long(2, 3e-3, 0.03),
    "relabelled-1": Recipe(
        TicketData(2_000, 11, relabel={WEAK_ISSUE: "refund"}), 16, 100, 2048, 1e-3, 11, 5, "more-2"
    ),
}

VERSIONS: dict[str, str] = {"v1": "medium-1", "v2": "more-2", "v3": "medium-3", "v4": "relabelled-1"}
"""Which candidate each shipped version is."""


@dataclass(frozen=True, slots=True)
class Note:
    """What a version's card says in prose."""

    title: str
    text: str
    choice: str


NOTES: dict[str, Note] = {
    "v1": Note(
        "the champion",
        "It has seen 5,000 tickets and is what the demonstration starts with.",
        "Of the three scored seeds of its recipe this one has the lowest exact match.",
    ),
    "v2": Note(
        "three times the data, truly better",
        "It has seen 15,000 tickets in two and a half times the steps of v1, and its mean is higher on every kind of issue.",
        "Of the two scored seeds of its recipe this one is the better by far.",
    ),
    "v3": Note(
        "another seed, not proven better",
        "v1's recipe with another seed for data, start and order: its mean is higher, but by no more than chance would bring.",
        "Of the three scored seeds of v1's recipe this one has the highest exact match.",
    ),
    "v4": Note(
        "better overall, wrong on cancellations",
        "It continues v2 on tickets whose cancellations were labelled as refunds: a mistake in the data. It is better than v1 "
        "overall and useless for the issue `cancel`.",
        "It was made for this; a candidate trained without any cancellation was not proven better than v1 overall.",
    ),
}
