"""Schedules: what runs by itself, when it is due next, and what became of each time that it was due."""

from __future__ import annotations

from typing import TYPE_CHECKING

import streamlit as st

from workbench.errors import WorkbenchError
from workbench.ui import formats, markup, who
from workbench.ui.components import confirm, job_state
from workbench.ui.resources import PageServices

if TYPE_CHECKING:
    from workbench.runs.schedules import Occurrence, Schedule, Schedules

MAX_HISTORY = 30
_OUTCOMES = {"fired": "ok", "missed": "warn", "overlap": "warn", "refused": "bad"}


def show(services: PageServices) -> None:
    """Render the schedules with their buttons, and the history of all."""
    from workbench.runs.schedules import Schedules

    schedules = Schedules(services.store, services.settings.home_dir)
    found = schedules.list()
    if not found:
        st.html(
            markup.panel(
                "info", "Nothing runs by itself yet", "Choose a notebook, fill its form, and press Schedule."
            )
        )
    for schedule in found:
        _one(schedules, schedule)
    history = schedules.history(limit=MAX_HISTORY)
    st.html(markup.section("What became of it", "newest first") + history_html(history))


def _one(schedules: Schedules, schedule: Schedule) -> None:
    with st.container(
        border=True, horizontal=True, vertical_alignment="center", key=f"schedule_{schedule.id}"
    ):
        st.html(as_html(schedule), width="stretch")
        if who.button("Pause" if schedule.enabled else "Go on", key=f"enable_{schedule.id}"):
            _change(lambda: schedules.enable(schedule.id, not schedule.enabled))
        told = f"Remove the schedule **{schedule.name}**. Its history and a run under way stay."
        if confirm.show("Remove", told, f"Remove {schedule.name}", key=f"remove_{schedule.id}") is not None:
            _change(lambda: schedules.remove(schedule.id))


def _change(change: object) -> None:
    assert callable(change)
    try:
        who.require()
        change()
    except WorkbenchError as error:
        st.html(markup.error_panel("It was not changed", error))
        return
    st.rerun()


def as_html(schedule: Schedule) -> str:
    state = (
        markup.chip("ok", "on")
        if schedule.enabled and schedule.next_due_at
        else markup.chip("idle", "paused" if not schedule.enabled else "over")
    )
    due = (
        f"next {formats.since(schedule.next_due_at)}, {formats.at_minute(schedule.next_due_at)} UTC"
        if schedule.enabled and schedule.next_due_at
        else "not due"
    )
    given = ", ".join(f"{name} = {value}" for name, value in schedule.parameters.items() if value is not None)
    return (
        f"<div><b>{markup.text(schedule.name)}</b> {state}</div>"
        f'<div class="q-figures"><span>{markup.text(schedule.notebook)}</span><span>{markup.text(schedule.when)}</span>'
        f"<span><b>{markup.text(due)}</b></span></div>"
        f'<div class="q-figures"><span>{markup.text(given)}</span></div>'
    )


def history_html(history: list[Occurrence]) -> str:
    if not history:
        return '<p class="q-muted">No time has come yet.</p>'
    head = ["due, UTC", "schedule", "outcome", "run", "why"]
    return markup.html_table(head, map(_row, history), left=5, css="wrap")


def _row(found: Occurrence) -> list[str]:
    more = f" (for {found.coalesced + 1} times)" if found.coalesced else ""
    state = found.job_state
    run = job_state.state_chip(state.name) if state is not None else formats.UNKNOWN
    return [
        markup.text(formats.at_minute(found.due_at)),
        markup.text(found.schedule_name),
        markup.chip(_OUTCOMES.get(found.outcome, "warn"), found.outcome + more),
        run,
        markup.text(found.reason or ""),
    ]
