"""What a page needs and may not have: the app's services, a first reading of the registry. Each lack is told in words."""

from __future__ import annotations

from typing import TypeVar

import streamlit as st

from workbench.ui import formats, markup, resources
from workbench.ui.components import page_errors
from workbench.ui.readings import Reading
from workbench.ui.resources import PageServices

T = TypeVar("T")
OLD_S = 15.0


def services() -> PageServices | None:
    """The app's services, or None after a notice."""
    found = resources.services()
    if found is None:
        st.html(
            markup.panel(
                "info", "This app keeps no records", "It was started without a home folder, so there are no jobs and versions.",
                [("what to do", "Start it with `quire up`.")],
            )
        )  # fmt: skip
    return found


def value(reading: Reading[T], what: str) -> T | None:
    """The reading's value with its age when it is old; a notice that goes on by itself while there is none."""
    if reading.value is None:
        if reading.error is not None:
            st.html(markup.error_panel(f"{what} could not be read", reading.error))
        else:
            st.html(
                markup.panel(
                    "info", f"Reading {what.lower()}", "This page goes on by itself when the answer is there."
                )
            )
        again(1.0 if reading.error is None else 5.0)
        return None
    if reading.error is not None:
        st.html(
            f'<p class="q-age warn">{markup.text(what)}: last read {formats.duration(reading.age_s)} ago; '
            f"reading it again failed: {markup.text(reading.error)}</p>"
        )
        again(5.0)
    return reading.value


def again(seconds: float) -> None:
    """Rerun the page after a moment."""
    runs = 0

    @st.fragment(run_every=seconds)  # type: ignore[untyped-decorator]
    @page_errors.shown()
    def tick() -> None:
        nonlocal runs
        runs += 1
        if runs > 1:  # the first run is the page's own
            st.rerun()

    tick()
