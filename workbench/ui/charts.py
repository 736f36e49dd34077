"""Plotly figures with the one template, as plain dictionaries built from numpy columns.

For charts that stand still: a live Plotly chart costs the browser half a core on a small machine (see
``components.step_timeline``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from workbench.ui import theme
from workbench.ui.theme import ThemeName

CONFIG = {"displaylogo": False, "modeBarButtonsToRemove": ["lasso2d", "select2d"], "responsive": True}
_PHASES = ("schedule", "prepare", "forward", "sample")


def step_times(columns: Mapping[str, NDArray[Any]], chosen: int | None, name: ThemeName) -> dict[str, Any]:
    """Single steps as stacked bars of CPU time; the chosen one is marked. N steps, 4 N points.

    `columns` are those of `StepColumns.around`.
    """
    ids = columns["step_id"].tolist()
    tokens = list(
        zip(columns["prefill"].astype(int).tolist(), columns["decode"].astype(int).tolist(), strict=True)
    )
    traces = [
        {
            "type": "bar",
            "name": phase,
            "x": ids,
            "y": columns[phase].round(4).tolist(),
            "customdata": tokens,
            "marker": {"color": theme.series_colour(phase, name), "line": {"width": 0}},
            "hovertemplate": "step %{x}, %{y:.3f} ms<br>%{customdata[0]} prefill and %{customdata[1]} decode tokens",
        }
        for phase in _PHASES
    ]
    layout: dict[str, Any] = {
        "template": theme.plotly_template(name),
        "barmode": "stack",
        "bargap": 0.15,
        "height": 260,
        "xaxis": {"title": {"text": "step"}, "tickformat": "d"},
        "yaxis": {"title": {"text": "ms"}, "rangemode": "tozero"},
    }
    if chosen is not None:
        layout["shapes"] = [_marker(chosen, theme.tokens(name).accent)]
    return {"data": traces, "layout": layout}


def _marker(step_id: int, colour: str) -> dict[str, Any]:
    return {
        "type": "rect", "xref": "x", "yref": "paper", "x0": step_id - 0.5, "x1": step_id + 0.5, "y0": 0, "y1": 1,
        "line": {"color": colour, "width": 2},
    }  # fmt: skip
