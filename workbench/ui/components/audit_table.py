"""The audit log's last entries: who changed what the server does."""

from __future__ import annotations

import streamlit as st

from workbench.access import audit
from workbench.access.audit import OK, Entry
from workbench.ui import formats, markup
from workbench.ui.resources import PageServices

MAX_ROWS = 30


def show(services: PageServices) -> None:
    found = audit.latest(services.store, MAX_ROWS)
    st.html(markup.section("Audit log", f"the last {MAX_ROWS} acts, newest first") + as_html(found))


def as_html(found: list[Entry]) -> str:
    if not found:
        return '<p class="q-muted">Nothing was done yet: loads, moves, keys, jobs and schedules are written here.</p>'
    head = ["when, UTC", "who", "act", "on", "outcome", "detail"]
    return markup.html_table(head, map(_row, found), left=6, css="wrap")


def _row(entry: Entry) -> list[str]:
    return [
        markup.text(formats.at_minute(entry.at)),
        markup.text(entry.principal),
        markup.text(entry.act),
        markup.text(entry.target),
        markup.chip("ok" if entry.outcome == OK else "bad", entry.outcome),
        markup.text(entry.detail),
    ]
