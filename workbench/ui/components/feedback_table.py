"""What people said about answers, newest first, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.errors import WorkbenchError
from workbench.ui import formats, markup, resources
from workbench.ui.markup import Cell

if TYPE_CHECKING:
    from workbench.observe.feedback import Feedback
    from workbench.store import Store

MAX_ROWS = 8
MAX_CHARS = 120


def as_html(max_age_s: float = 0.0) -> str:
    """The newest of it, read within `max_age_s`; a sentence when there is none; empty in an app without a store."""
    services = resources.services()
    if services is None:
        return ""
    store = services.store
    return resources.readings().read("feedback table", lambda: _as_html(store), max_age_s)


def _as_html(store: Store) -> str:
    from workbench.observe import feedback

    try:
        found = feedback.list_feedback(store, limit=MAX_ROWS)
        counts = feedback.summary(store)
    except WorkbenchError as error:
        return markup.section("Feedback") + markup.error_panel("Feedback could not be read", error)
    said = counts.num_up + counts.num_down
    note = f"{counts.num_up:,} of {said:,} thumbs up, n = {said:,}" if said else "newest first"
    if not found:
        return markup.section("Feedback") + (
            '<p class="q-muted">Nobody has said anything yet. Each answer of the Playground has thumbs under it.</p>'
        )
    return markup.section("Feedback", note) + markup.table(
        ["what", "said", "request", "when"], map(_row, found), left=3
    )


def _row(one: Feedback) -> list[Cell]:
    if one.kind == "thumbs":
        told, css = str(one.value), ""
        told = f"{told} {one.comment or ''}"
    elif one.kind == "score":
        told, css = f"{formats.significant(float(one.value or 0))} of 5 {one.comment or ''}", ""
    else:
        told, css = (one.correction if one.kind == "correction" else one.comment) or "", ""
    shown = told.strip()
    return [
        Cell(one.kind),
        Cell(shown if len(shown) <= MAX_CHARS else shown[: MAX_CHARS - 1] + "…", css),
        Cell(one.request_id[:12], "q-mono"),
        Cell(formats.since(one.created_at)),
    ]
