"""The moves of an alias, newest first: when, from which version to which, why and by whom."""

from __future__ import annotations

from typing import TYPE_CHECKING

import streamlit as st

from workbench.ui import formats, markup, registry_view
from workbench.ui.markup import Cell
from workbench.ui.registry_view import CHAMPION

if TYPE_CHECKING:
    from workbench.ui.resources import PageServices
    from workbench.versions.registry import AliasMove

MAX_ROWS = 20


def show(services: PageServices, name: str) -> None:
    reading = registry_view.history(services, name)
    st.html(markup.section(f"History of @{CHAMPION}", "newest first"))
    if reading.value is None and reading.error is not None:
        st.html(markup.error_panel("The history could not be read", reading.error))
        return
    st.html(as_html(reading.value or []))


def as_html(moves: list[AliasMove]) -> str:
    if not moves:
        return '<p class="q-muted">The alias has not been set yet: promote a version.</p>'
    head = ["when, UTC", "move", "why", "who"]
    return markup.table(head, map(_row, moves[:MAX_ROWS]), left=4)


def _row(move: AliasMove) -> list[Cell]:
    before = f"v{move.from_version}" if move.from_version else "none"
    after = f"v{move.to_version}" if move.to_version else "none"
    return [
        Cell(formats.at_minute(str(move.at))),
        Cell(f"{before} → {after}"),
        Cell(move.reason or formats.UNKNOWN),
        Cell(move.who or formats.UNKNOWN),
    ]
