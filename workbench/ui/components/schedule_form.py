"""Schedule a notebook with the parameters of its form: by a cron line, every so often, or once."""

from __future__ import annotations

from typing import Any

import streamlit as st

from engine.errors import EngineError
from workbench.errors import WorkbenchError
from workbench.ui import formats, markup, who
from workbench.ui.glossary import tip
from workbench.ui.resources import PageServices

CRON, EVERY, ONCE = "Cron line", "Interval", "Once"
_UNITS = {"minutes": 60.0, "hours": 3600.0, "days": 86_400.0}


def show(services: PageServices, notebook: str, values: dict[str, Any], *, disabled: bool) -> None:
    """A popover with the form; what was refused or added is told in it."""
    refused = who.lacks()
    off = disabled or refused is not None
    with st.popover("Schedule", disabled=off, help=refused or tip("schedule"), key="schedule_open"):
        kind = st.segmented_control(
            "When", [CRON, EVERY, ONCE], default=CRON, key="when", bind="query-params", required=True
        )
        trigger = _trigger(kind)
        name = st.text_input(
            "Name", key="schedule_name", bind="query-params", placeholder=f"nightly {notebook}"
        )
        if st.button("Add the schedule", type="primary", key="schedule_add"):
            _add(services, (name or "").strip() or f"nightly {notebook}", notebook, values, trigger)


def _trigger(kind: str | None) -> dict[str, Any]:
    if kind == ONCE:
        at = st.text_input(
            "At, ISO 8601", key="at", bind="query-params", placeholder="2026-12-24T03:00:00+01:00"
        )
        return {"at": (at or "").strip()}
    if kind == EVERY:
        left, right = st.columns(2, vertical_alignment="bottom")
        every = left.number_input("Every", 1, 10_000, 1, key="every", bind="query-params")
        unit = right.selectbox(
            "Unit", list(_UNITS), key="unit", bind="query-params", label_visibility="collapsed"
        )
        return {"every_s": every * _UNITS[unit]}
    cron = st.text_input(
        "Minute, hour, day, month, weekday",
        "0 3 * * *",
        key="cron",
        bind="query-params",
        help="0 3 * * * is every night at three.",
    )
    return {"cron": (cron or "").strip()}


def _add(
    services: PageServices, name: str, notebook: str, values: dict[str, Any], trigger: dict[str, Any]
) -> None:
    from workbench.runs.schedules import Schedules

    try:
        who.require()
        added = Schedules(services.store, services.settings.home_dir).add(name, notebook, values, **trigger)
    except (WorkbenchError, EngineError) as error:
        st.html(markup.error_panel("It was not scheduled", error))
        return
    st.html(
        f'<p class="ok-text" role="status">✓ {markup.text(added.name)}: next {markup.text(formats.since(added.next_due_at))}</p>'
    )
