"""Plotly figures with the one template, as plain dictionaries built from numpy columns.

For charts that stand still: a live Plotly chart costs the browser half a core on a small machine (see
``components.step_timeline``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workbench.ui import theme
from workbench.ui.theme import ThemeName

CONFIG = {"displaylogo": False, "modeBarButtonsToRemove": ["lasso2d", "select2d"], "responsive": True}
MAX_POINTS = 5000  # go to the browser for one chart
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


@dataclass(frozen=True, slots=True)
class Curve:
    """The measured values of one run, to be drawn as its distribution. `colour` is an id for `theme.colour_of`."""

    label: str
    values: Sequence[float]
    colour: str
    dash: bool = False


def distributions(
    curves: Sequence[Curve], title: str, name: ThemeName, *, limit: float | None = None, log: bool = False
) -> dict[str, Any]:
    """Cumulative distributions over one time axis in ms: the share of values at or below x. `limit` is drawn as a line."""
    room = MAX_POINTS // max(1, len(curves))
    traces = []
    for curve in curves:
        x, y = cumulative(curve.values, room)
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": f"{curve.label}, n = {len(curve.values):,}",
                "x": x.round(4).tolist(),
                "y": y.round(5).tolist(),
                "line": {
                    "color": theme.colour_of(curve.colour, name),
                    "width": 2,
                    "shape": "hv",
                    "dash": "dash" if curve.dash else "solid",
                },
                "hovertemplate": "%{y:.1%} of them within %{x:.4g} ms",
            }
        )
    layout: dict[str, Any] = {
        "template": theme.plotly_template(name),
        "height": 260,
        "showlegend": True,
        "xaxis": {
            "title": {"text": f"{title}, ms{' (log)' if log else ''}"},
            "type": "log" if log else "linear",
            **({} if log else {"rangemode": "tozero"}),
        },
        "yaxis": {"title": {"text": "share of them"}, "tickformat": ".0%", "range": [0, 1.02]},
    }
    if limit is not None:
        layout |= _limit_line(limit, log, theme.tokens(name).muted)
    return {"data": traces, "layout": layout}


def cumulative(values: Sequence[float], most: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sorted values with the share of values at or below each; at most `most` points, the ends always among them."""
    x = np.sort(np.asarray(values, np.float64))
    if not len(x):
        return x, x
    y = np.arange(1, len(x) + 1) / len(x)
    if len(x) > most:
        kept = np.unique(np.linspace(0, len(x) - 1, most).round().astype(np.int64))
        x, y = x[kept], y[kept]
    return x, y


@dataclass(frozen=True, slots=True)
class Interval:
    """A difference with its interval; `kind` is ok (proven better), bad (proven worse) or warn (not proven)."""

    label: str
    value: float
    low: float
    high: float
    kind: str
    told: str = ""


def intervals(rows: Sequence[Interval], title: str, name: ThemeName) -> dict[str, Any]:
    """Differences with their intervals, one a line, around zero; shape and colour say whether each is proven."""
    t = theme.tokens(name)
    looks = {
        "ok": (t.ok, "circle", "proven better"),
        "bad": (t.bad, "diamond", "proven worse"),
        "warn": (t.warn, "circle-open", "not proven"),
    }
    traces = []
    for kind, (colour, symbol, label) in looks.items():
        found = [row for row in rows if row.kind == kind]
        if not found:
            continue
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": label,
                "x": [row.value for row in found],
                "y": [row.label for row in found],
                "customdata": [row.told for row in found],
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": [row.high - row.value for row in found],
                    "arrayminus": [row.value - row.low for row in found],
                    "color": colour,
                    "thickness": 2,
                    "width": 6,
                },
                "marker": {
                    "color": colour,
                    "size": 10,
                    "symbol": symbol,
                    "line": {"width": 2, "color": colour},
                },
                "hovertemplate": "%{y}: %{customdata}<extra></extra>",
            }
        )
    layout: dict[str, Any] = {
        "template": theme.plotly_template(name),
        "height": 110 + 28 * max(1, len(rows)),
        "showlegend": True,
        "margin": {"l": 170, "r": 16, "t": 36, "b": 44},
        "xaxis": {"title": {"text": title}, "zeroline": False},
        "yaxis": {
            "type": "category",
            "categoryorder": "array",
            "categoryarray": [row.label for row in reversed(rows)],
            "automargin": True,
        },
        "shapes": [_line_at(0, t.muted)],
    }
    return {"data": traces, "layout": layout}


def heat_map(
    values: NDArray[np.float64], labels: Sequence[str], title: str, name: ThemeName
) -> dict[str, Any]:
    """Values [n, n] in -1 … 1 between labelled things, each also written in its cell where there is room for it."""
    t, n = theme.tokens(name), len(labels)
    short = [f"{i}  {label[:28]}{'…' if len(label) > 28 else ''}" for i, label in enumerate(labels, 1)]
    trace = {
        "type": "heatmap",
        "z": values.round(4).tolist(),
        "customdata": [[[labels[i], labels[j]] for j in range(n)] for i in range(n)],
        "zmin": min(0.0, float(values.min())),
        "zmax": 1,
        "colorscale": [[0, t.surface], [1, t.accent]],
        "colorbar": {"title": {"text": title}, "thickness": 12},
        "texttemplate": "%{z:.2f}" if n <= 12 else "",
        "xgap": 2,
        "ygap": 2,
        "hovertemplate": "%{customdata[0]}<br>%{customdata[1]}<br>" + title + " %{z:.4f}<extra></extra>",
    }
    numbers = list(range(n))
    layout: dict[str, Any] = {
        "template": theme.plotly_template(name),
        "height": 140 + 34 * n,
        "xaxis": {"tickvals": numbers, "ticktext": [str(i + 1) for i in numbers], "side": "top"},
        "yaxis": {"tickvals": numbers, "ticktext": short, "autorange": "reversed", "automargin": True},
    }
    return {"data": [trace], "layout": layout}


def _limit_line(limit: float, log: bool, colour: str) -> dict[str, Any]:
    at = float(np.log10(limit)) if log else limit
    note = {
        "x": at, "xref": "x", "y": 0.02, "yref": "paper", "text": "SLO", "showarrow": False, "xanchor": "left",
        "font": {"color": colour}, "xshift": 4,
    }  # fmt: skip
    return {"shapes": [_line_at(limit, colour)], "annotations": [note]}


def _line_at(x: float, colour: str) -> dict[str, Any]:
    return {
        "type": "line", "xref": "x", "yref": "paper", "x0": x, "x1": x, "y0": 0, "y1": 1,
        "line": {"color": colour, "width": 1.5, "dash": "dot"},
    }  # fmt: skip


def _marker(step_id: int, colour: str) -> dict[str, Any]:
    return {
        "type": "rect", "xref": "x", "yref": "paper", "x0": step_id - 0.5, "x1": step_id + 0.5, "y0": 0, "y1": 1,
        "line": {"color": colour, "width": 2},
    }  # fmt: skip
