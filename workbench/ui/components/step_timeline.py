"""The step timeline: tokens, CPU time, queue and blocks over one time axis, as one canvas.

Live, ``live.js`` hands it new data (the event ``quire-live``). A refresh must cost little on both sides, so this is a canvas of binned values rather than a Plotly chart (measured on
2 cores with software rendering: 39 ms of browser CPU a refresh against 506 ms). Single steps are a Plotly chart in
``workbench.ui.charts``.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workbench.ui import theme
from workbench.ui.step_columns import Bins
from workbench.ui.theme import ThemeName

_HTML = '<div class="timeline"><canvas role="img" tabindex="0"></canvas><div class="tip" role="status" hidden></div></div>'
_CSS = """
.timeline { position: relative; font: 12px/1.4 var(--st-font, sans-serif); color: var(--st-text-color); }
canvas { width: 100%; display: block; cursor: crosshair; }
canvas:focus-visible { outline: 2px solid var(--st-primary-color); outline-offset: 2px; border-radius: 4px; }
.tip { position: absolute; z-index: 9; padding: 6px 10px; border-radius: 6px; pointer-events: none; white-space: nowrap;
  background: var(--st-secondary-background-color); border: 1px solid var(--st-border-color); }
"""
# title, unit, kind, lowest top of the y axis, (label, column, role of the colour, dashed)
_PANELS: tuple[tuple[str, str, str, float, tuple[tuple[str, str, str, bool], ...]], ...] = (
    ("Tokens a second", "tokens/s", "bars", 10,
     (("decode", "decode", "decode", False), ("prefill", "prefill", "prefill", False))),
    ("CPU time a step, ms", "ms", "bars", 1,
     (("schedule", "schedule", "schedule", False), ("prepare", "prepare", "prepare", False),
      ("forward", "forward", "forward", False), ("sample", "sample", "sample", False))),
    ("Sequences", "", "lines", 4, (("running", "running", "running", False), ("waiting", "waiting", "waiting", True))),
)  # fmt: skip


def show(
    bins: Bins, now_ns: int, num_blocks: int, *, marker_ns: int | None = None, key: str = "timeline"
) -> int | None:
    """Render; the time (monotonic ns) that was picked by a click in this run, or None."""
    data = payload(bins, now_ns, num_blocks, theme.current(), marker_ns)
    return show_payload(data, bins.until_ns / 1e9, key=key)


def show_payload(data: dict[str, Any], at_s: float, *, key: str = "timeline") -> int | None:
    """Like `show`, of a window that ends at `at_s` (monotonic seconds)."""
    picked = _component()(key=key, data={**data, "at_s": at_s}, on_pick_change=lambda: None).pick
    return int(picked * 1e9) if isinstance(picked, int | float) else None


def payload(
    bins: Bins, now_ns: int, num_blocks: int, name: ThemeName, marker_ns: int | None = None
) -> dict[str, Any]:
    """What the browser gets: at most `step_columns.MAX_BINS` bins of nine series."""
    t, first, last = theme.tokens(name), (bins.since_ns - now_ns) / 1e9, (bins.until_ns - now_ns) / 1e9
    panels = [
        {
            "title": title,
            "unit": unit,
            "kind": kind,
            "floor": floor,
            "series": [
                _series(label, bins.values[column], role, dash, name) for label, column, role, dash in series
            ],
        }
        for title, unit, kind, floor, series in _PANELS
    ]
    return {
        "bins": len(bins.num_steps),
        "panels": [*panels, _blocks_panel(bins, num_blocks, name)],
        "step_ids": bins.last_step_id.tolist(),
        "times": [round(first, 2), round(last, 2)],
        "window_s": (bins.until_ns - bins.since_ns) / 1e9,
        "ticks": [_tick(first + (last - first) * k / 4) for k in range(5)],
        "marker": None
        if marker_ns is None
        else (marker_ns - bins.since_ns) / (bins.until_ns - bins.since_ns),
        "pickable": True,
        "colours": {"text": t.text, "muted": t.muted, "border": t.border, "accent": t.accent},
        "summary": f"Timeline of {int(bins.num_steps.sum()):,} steps over {last - first:.0f} s.",
    }


def _blocks_panel(bins: Bins, num_blocks: int, name: ThemeName) -> dict[str, Any]:
    whole = max(1, num_blocks)
    held = 100 * (whole - bins.values["free"]) / whole
    cached = 100 * bins.values["cached"] / whole
    grey = {**_series("cached", cached, "used", False, name), "colour": theme.tokens(name).cached}
    series = [_series("held", held, "used", False, name), grey]
    return {
        "title": "KV blocks, % of the pool",
        "unit": "%",
        "kind": "bars",
        "floor": 1,
        "max": 100,
        "series": series,
    }


def _series(
    label: str, values: NDArray[np.float64], role: str, dash: bool, name: ThemeName
) -> dict[str, Any]:
    encoded = base64.b64encode(values.astype("<f4").tobytes()).decode()
    return {"label": label, "colour": theme.series_colour(role, name), "dash": dash, "values": encoded}


def _tick(seconds: float) -> str:
    seconds = min(0.0, seconds)
    if seconds > -0.5:
        return "now"
    halves = round(-2 * seconds) / 2
    return f"−{halves:g} s" if seconds > -119 else f"−{halves / 60:.2g} min"


@cache
def _component() -> Callable[..., Any]:
    import streamlit as st

    script = Path(__file__).with_suffix(".js").read_text("utf-8")
    made: Callable[..., Any] = st.components.v2.component(
        "quire.step_timeline", html=_HTML, css=_CSS, js=script
    )
    return made
