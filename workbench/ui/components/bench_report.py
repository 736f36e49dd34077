"""The report of a benchmark: figures first, distributions, the percentiles beside those of an earlier run, its conditions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import streamlit as st

from workbench.ui import benchmark_result, charts, formats, markup, theme
from workbench.ui.benchmark_result import LATENCIES, QUANTILES, Saved, Slo, percentile
from workbench.ui.components import mlflow_link, needs
from workbench.ui.markup import Cell, Tile, term

if TYPE_CHECKING:
    from workbench.jobs import Job
    from workbench.ui.resources import PageServices

MAX_DIFFERENCES = 12


def show(services: PageServices, saved: Saved, slo: Slo, earlier: Saved | None) -> None:
    """Render the report; beside it the figures of `earlier`, if one was chosen."""
    st.html(markup.tiles(_tiles(saved.figures, _slo_tile(saved, slo), saved.record.engine)))
    for note in saved.record.notes:
        st.html(markup.panel("warn", "What a reader must know", note))
    _distributions(saved, slo, earlier)
    if earlier is not None:
        _comparison(earlier, saved)
    st.html(markup.section("Percentiles", "from the raw records") + percentiles(saved.figures))
    st.html(markup.section("Conditions", "what the figures depend on") + conditions(saved))
    with st.container(horizontal=True):
        mlflow_link.show(services, (saved.record.mlflow or {}).get("run_id"))
        st.download_button(
            "Download the requests (CSV)", data=lambda: benchmark_result.csv_of(saved.requests),
            file_name=f"{saved.record.id}.csv", mime="text/csv", on_click="ignore",
        )  # fmt: skip


def partial(job: Job) -> None:
    """The figures so far of a running job."""
    figures = (job.partial or {}).get("figures")
    if figures:
        st.html(markup.section("So far") + markup.tiles(_tiles(figures, None, None)))


def _slo_tile(saved: Saved, slo: Slo) -> Tile:
    kept, ended = benchmark_result.share_within(saved.requests, slo)
    limits = [
        f"{name.removesuffix('_ms').upper()} ≤ {formats.significant(value)}"
        for name, value in slo.items()
        if value
    ]
    return Tile(
        term("SLO", "Kept the SLO"), formats.percent(kept, ended), f"{', '.join(limits)} ms, n = {ended:,}"
    )


def _tiles(figures: Mapping[str, Any], slo: Tile | None, engine: Mapping[str, Any] | None) -> list[Tile]:
    limit = (engine or {}).get("limit") or {}
    share = limit.get("share_of_limit")
    failed = int(figures.get("num_failed") or 0)
    tiles = [
        Tile(f"{term('TTFT')}, p95", formats.milliseconds(percentile(figures, "ttft_ms", "p95")),
             f"median {formats.milliseconds(percentile(figures, 'ttft_ms', 'p50'))}"),
        Tile(f"{term('TPOT')}, p95", formats.milliseconds(percentile(figures, "tpot_ms", "p95")),
             f"median {formats.milliseconds(percentile(figures, 'tpot_ms', 'p50'))}"),
        Tile("Output", formats.significant(figures.get("output_tokens_per_s")), "tokens/s"),
        Tile(term("share of limit", "Of the limit"), formats.UNKNOWN if share is None else f"{formats.significant(100 * share)} %",
             benchmark_result.bound_by(limit)),
    ]  # fmt: skip
    return [
        *tiles,
        *([slo] if slo else []),
        Tile("Requests", formats.count(figures.get("num_requests")), f"{failed:,} failed"),
    ]


def _distributions(saved: Saved, slo: Slo, earlier: Saved | None) -> None:
    shown = [(name, label) for name, label in LATENCIES if benchmark_result.samples(saved.requests, name)]
    if not shown:
        return
    log = st.toggle("Logarithmic time axis", key="log_time", bind="query-params")
    for place in range(0, len(shown), 2):
        for column, (name, label) in zip(st.columns(2, gap="medium"), shown[place : place + 2], strict=False):
            curves = [charts.Curve("this run", benchmark_result.samples(saved.requests, name), saved.model)]
            if earlier is not None:
                values = benchmark_result.samples(earlier.requests, name)
                curves.append(charts.Curve("earlier run", values, earlier.model, dash=True))
            with column:
                st.html(markup.section(label, "share of tokens" if name == "itl_ms" else "share of requests"))
                figure = charts.distributions(curves, label, theme.current(), limit=slo.get(name), log=log)
                alt = f"Distribution of {label}"
                st.plotly_chart(figure, theme=None, config=charts.CONFIG, key=f"cdf_{name}", alt=alt)


def _comparison(earlier: Saved, saved: Saved) -> None:
    found = needs.value(benchmark_result.compared(earlier, saved), "The comparison of both runs")
    if found is None:
        return
    paired = "the same requests, drawn in pairs" if found["paired"] else "different requests"
    st.html(
        markup.section("Beside the earlier run", f"{paired}; 95 % intervals by bootstrap") + ratios(found)
    )


def ratios(found: Mapping[str, Any]) -> str:
    """A table of ratios, this run ÷ the earlier one, and what besides the figures differs."""
    head = ["figure", "", "earlier", "this run", "ratio, 95 % interval", "n"]
    rows = [_ratio(name, each) for name, each in found["metrics"].items()]
    differs = [
        f"{name}: {before} → {now}"
        for name, (before, now) in list(found["differences"].items())[:MAX_DIFFERENCES]
    ]
    told = f'<p class="q-muted">Also different: {markup.text("; ".join(differs))}</p>' if differs else ""
    return markup.table(head, rows, left=2) + told


def _ratio(name: str, found: Mapping[str, Any]) -> list[Cell]:
    label, kind = _VERDICTS.get(str(found["verdict"]), (str(found["verdict"]), "warn"))
    limits = f"[{formats.significant(found['low'])}, {formats.significant(found['high'])}]"
    return [
        Cell(name.replace("_ms_", ", ms, ")),
        Cell(label, kind),
        Cell(formats.significant(found["a"])),
        Cell(formats.significant(found["b"])),
        Cell(f"{formats.significant(found['ratio'])} {limits}"),
        Cell(f"{found['n_a']:,} and {found['n_b']:,}"),
    ]


_VERDICTS = {
    "better": ("✓ better", "ok"),
    "worse": ("✕ worse", "bad"),
    "not proven": ("? not proven", "warn"),
}


def percentiles(figures: Mapping[str, Any]) -> str:
    """A table of mean and percentiles in ms."""
    rows = [
        [Cell(label), *(Cell(formats.significant(percentile(figures, name, q))) for q in QUANTILES)]
        for name, label in LATENCIES
    ]
    return markup.table(["ms", *QUANTILES], rows)


def conditions(saved: Saved) -> str:
    """Workload, target, machine, versions, commit, and whether the generator kept time."""
    record = saved.record
    target, machine, late = record.target, record.machine, record.figures.get("generator") or {}
    told: list[tuple[str, object]] = [
        ("model", saved.model),
        ("digest", str(target.get("version_digest") or "")[:8]),
        ("workload", record.title),
        ("requests", record.spec.requests),
        ("seed", record.spec.seed),
        ("offered", f"{formats.significant(record.offered_rps)} requests/s" if record.offered_rps else ""),
        ("dtype", target.get("dtype")),
        ("device", target.get("device")),
        ("processor", machine.get("cpu")),
        ("cores", machine.get("cores")),
        ("commit", str(record.commit.get("revision") or "")[:8]),
        ("generator late, p99", formats.milliseconds((late.get("lateness_ms") or {}).get("p99"))),
        ("agrees with the engine's records, p95", formats.milliseconds(((record.agreement or {}).get("e2e_ms") or {}).get("p95"))),
        ("took", formats.duration(record.figures.get("duration_s"))),
    ]  # fmt: skip
    shown = "".join(
        f"<span>{markup.text(name)} <b>{markup.text(value)}</b></span>"
        for name, value in told
        if value not in (None, "", formats.UNKNOWN)
    )
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    return f'<div class="q-figures">{shown}<span>{markup.text(versions)}</span></div>'
