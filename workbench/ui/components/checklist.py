"""The first ten minutes as a checklist, ticked from records alone: the request log, jobs, and the alias's history.

Nothing that a session knows counts, so the ticks are the same in every browser and after a restart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import streamlit as st

from workbench.ui import markup, registry_view, resources, site

if TYPE_CHECKING:
    from workbench.ui.resources import PageServices
    from workbench.versions.registry import Registry

DEMO_NAME = "ticket-extractor"
SEEDED_NAMES = frozenset({DEMO_NAME, "chat-base"})
SUBJECT = "checklist"  # of what is read from this machine's own records
TTL_S = 4.0
REGISTRY_TTL_S = 15.0  # what our own pages change is told at once (Readings.forget)
DONE_TTL_S = 300.0
REGISTRY_WAIT_S = 0.05


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to do; `page` is where."""

    key: str
    title: str
    note: str
    page: str


STEPS = (
    Step("ask", "Ask the model something", "Playground: a click on a task sends it", "playground"),
    Step("benchmark", "Run a 30-second benchmark", "Benchmark: the preset fills the form", "benchmark"),
    Step(
        "compare",
        "Compare two fine-tuned versions",
        "Compare: the form proposes v1 and v2",
        "compare",
    ),
    Step(
        "promote",
        "Promote the better one",
        "Compare or Versions: the alias moves, the engine follows",
        "versions",
    ),
    Step("roll_back", "Roll back", "Versions: one click and a confirmation", "versions"),
    Step("own_model", "Load your own model", "Versions: a folder or a hub id", "versions"),
)
Done = Mapping[str, bool]


def done(services: PageServices) -> dict[str, bool]:
    """What the records say, as far as they could be read by now. Never waits long."""
    get = resources.readings().get
    local = get((SUBJECT,), lambda: _told_locally(services), ttl_s=lambda told: _ttl_s(told, TTL_S))
    registered = get(
        (registry_view.REGISTRY, "checklist"),
        lambda: _told_by_registry(services.registry()),
        ttl_s=lambda told: _ttl_s(told, REGISTRY_TTL_S),
        wait_s=REGISTRY_WAIT_S,
    )
    told = {**(local.value or {}), **(registered.value or {})}
    return {step.key: told.get(step.key, False) for step in STEPS}


def _ttl_s(told: Done, while_open_s: float) -> float:
    """What is done stays done: it is read again only now and then, since the registry is not free to ask."""
    return DONE_TTL_S if all(told.values()) else while_open_s


def next_step(ticked: Done) -> Step | None:
    return next((step for step in STEPS if not ticked.get(step.key)), None)


def as_html(ticked: Done) -> str:
    """The list, folded away when all is done."""
    number = sum(bool(ticked.get(step.key)) for step in STEPS)
    items = "".join(
        _item(place, step, bool(ticked.get(step.key))) for place, step in enumerate(STEPS, start=1)
    )
    listed = f'<ol class="q-checks">{items}</ol>'
    if number == len(STEPS):
        return f'<details class="q-doubt"><summary>First steps: all {number} done</summary>{listed}</details>'
    return markup.section("First steps", f"{number} of {len(STEPS)} done") + listed


def show_next(ticked: Done) -> None:
    """The way to the next step; nothing when all is done."""
    step = next_step(ticked)
    if step is not None:
        st.page_link(
            site.page(step.page),
            label=f"**Next: {step.title[0].lower()}{step.title[1:]}**",
            icon=":material/arrow_forward:",
        )


def _item(place: int, step: Step, is_done: bool) -> str:
    box = "✓" if is_done else str(place)
    told = "done" if is_done else "to do"
    return (
        f'<li class="{"done" if is_done else ""}"><span class="box" role="img" aria-label="{told}">{box}</span>'
        f"<b>{markup.text(step.title)}</b><small>{markup.text(step.note)}</small></li>"
    )


def _told_locally(services: PageServices) -> Done:
    """By the request log, the saved benchmarks and the jobs."""
    from workbench.bench import saved
    from workbench.jobs import JobState
    from workbench.observe.request_log import RequestLog

    home = services.settings.home_dir
    return {
        "ask": len(RequestLog.read(home, limit=1)) > 0,
        "benchmark": any(not record.cancelled for record in saved.listed(home, limit=20)),
        "compare": bool(services.jobs.list(states=[JobState.DONE], kind="compare", limit=1)),
    }


def _told_by_registry(registry: Registry) -> Done:
    """By its names and the moves of each name's champion."""
    names = registry.names()
    moves = [registry.history(name, registry_view.CHAMPION) for name in names]
    return {
        "promote": any(map(registry_view.was_promoted, moves)),
        "roll_back": any(map(registry_view.was_rolled_back, moves)),
        "own_model": bool(set(names) - SEEDED_NAMES),
    }
