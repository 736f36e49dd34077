"""Live or paused, which window, and when paused which moment: the controls of the Engine page's time axis.

Times are monotonic nanoseconds. While paused the page looks at a fixed moment; nothing refreshes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import streamlit as st

from workbench.ui.step_columns import StepColumns

LIVE, PAUSED = "Live", "Paused"
WINDOWS = {30: "30 s", 120: "2 min", 600: "10 min"}
NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class View:
    """`at_ns` is None when live. The window ends at `until_ns`."""

    window_s: int
    at_ns: int | None = None
    paused_ns: int = 0
    until_ns: int = 0


def show(columns: StepColumns) -> View:
    state = st.session_state
    if (
        "engine_pick" in state
    ):  # a click on the timeline in the last run: widgets can only be set before they exist
        state.engine_at, state.engine_paused = state.pop("engine_pick")
        state.mode = PAUSED
        state.back = _seconds_back()
    with st.container(horizontal=True, vertical_alignment="bottom"):
        mode = st.segmented_control(
            "View", [LIVE, PAUSED], default=LIVE, key="mode", required=True, on_change=_mode_changed,
            help="Pause to scrub back; a click on the timeline pauses there.",
        )  # fmt: skip
        window_s = st.segmented_control(
            "Window", list(WINDOWS), format_func=lambda s: WINDOWS[s], default=30, key="window", required=True
        )
        if mode == PAUSED:
            _steps(columns)
    window_s = window_s or 30
    if mode != PAUSED:
        return View(window_s)
    return _paused(columns, window_s)


def pause_at(at_ns: int, now_ns: int) -> None:
    """Ask for a pause at a moment; takes effect in the next run."""
    st.session_state.engine_pick = (at_ns, now_ns)


def _paused(columns: StepColumns, window_s: int) -> View:
    state = st.session_state
    if "engine_paused" not in state:
        _mode_changed()
    span = columns.span_ns()
    longest = min(600.0, (state.engine_paused - span[0]) / NS + 1) if span else 1.0
    state.back = min(max(state.get("back", 0.0), -longest), 0.0)
    st.slider(
        "Moment, seconds before the pause", -round(longest, 1) - 0.1, 0.0, step=0.1, key="back", format="%.1f s",
        on_change=_scrubbed,
    )  # fmt: skip
    at, until = state.engine_at, state.engine_paused
    if at < until - window_s * NS:
        until = at + window_s * NS // 2
    return View(window_s, at, state.engine_paused, until)


def _steps(columns: StepColumns) -> None:
    for label, offset, key in (("Step back", -1, "Left"), ("Step on", 1, "Right")):
        st.button(label, shortcut=f"Alt+{key}", on_click=_move, args=(columns, offset), key=f"step_{key}")


def _move(columns: StepColumns, offset: int) -> None:
    found = columns.neighbour(st.session_state.engine_at, offset)
    if found is not None:
        st.session_state.engine_at = found
        st.session_state.back = _seconds_back()


def _mode_changed() -> None:
    now = time.monotonic_ns()
    st.session_state.engine_at = st.session_state.engine_paused = now
    st.session_state.back = 0.0


def _scrubbed() -> None:
    st.session_state.engine_at = st.session_state.engine_paused + int(st.session_state.back * NS)


def _seconds_back() -> float:
    at: int = st.session_state.engine_at
    paused: int = st.session_state.engine_paused
    return min(0.0, round((at - paused) / NS, 1))
