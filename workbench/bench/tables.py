"""A benchmark for people to read: tables of its figures and a chart of its latencies, for notebooks and reports.

Boundary: forms. Every number is taken from the record or the table of requests as it is; nothing is measured or rounded away.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.bench.report import METRICS

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

    from workbench.bench.saved import BenchmarkRecord

MAX_POINTS = 2_000  # of a curve


def figure_table(record: BenchmarkRecord) -> pd.DataFrame:
    """Latencies by statistic, then rates and counts; column `value` or the statistic's name."""
    import pandas as pd

    found = record.figures
    rows = {name: found[name] for name in METRICS}
    table = pd.DataFrame.from_dict(rows, orient="index")
    names = ("output_tokens_per_s", "requests_per_s", "num_ok", "num_failed", "duration_s")
    rates = {name: {"mean": found[name]} for name in names}
    if found["goodput"]:
        rates["goodput_requests_per_s"] = {"mean": found["goodput"]["requests_per_s"]}
    return pd.concat([table, pd.DataFrame.from_dict(rates, orient="index")])


def step_table(record: BenchmarkRecord) -> pd.DataFrame:
    """What the engine's steps did, one figure a row; empty where the engine's records could not be read."""
    import pandas as pd

    engine = dict(record.engine or {})
    limit = engine.pop("limit", None) or {}
    flat: dict[str, Any] = {}
    for name, value in {**engine, **limit}.items():
        flat |= (
            {f"{name}_{key}": each for key, each in value.items()}
            if isinstance(value, dict)
            else {name: value}
        )
    for name, value in (record.agreement or {}).items():
        flat |= {f"agreement_{name}_p95": value["p95"]} if isinstance(value, dict) else {}
    return pd.DataFrame({"value": pd.Series(flat, dtype=object)})


def ratio_table(compared: dict[str, Any]) -> pd.DataFrame:
    """What `compare_benchmarks` found, one figure a row."""
    import pandas as pd

    return pd.DataFrame.from_dict(compared["metrics"], orient="index")


def latency_chart(requests: pd.DataFrame) -> Figure:
    """Shares of requests by latency: one curve a metric, the engine's own dotted. Imports plotly."""
    from plotly.graph_objects import Figure, Scatter

    chart = Figure()
    for name in ("ttft_ms", "tpot_ms", "e2e_ms"):
        for column, dash in ((name, "solid"), (f"engine_{name}", "dot")):
            if column in requests and requests[column].notna().any():
                x, y = cdf(requests[column].dropna().to_numpy(float))
                chart.add_trace(
                    Scatter(x=x, y=y, mode="lines", name=column, line={"dash": dash, "shape": "hv"})
                )
    chart.update_layout(
        xaxis={"title": "milliseconds (log)", "type": "log"},
        yaxis={"title": "share of requests", "range": [0, 1]},
        height=360,
    )
    return chart


def cdf(values: np.ndarray) -> tuple[list[float], list[float]]:
    """The empirical distribution, at most MAX_POINTS points."""
    ordered = np.sort(values)
    shares = np.arange(1, len(ordered) + 1) / len(ordered)
    if len(ordered) > MAX_POINTS:
        picks = np.linspace(0, len(ordered) - 1, MAX_POINTS).astype(int)
        ordered, shares = ordered[picks], shares[picks]
    return ordered.tolist(), shares.tolist()
