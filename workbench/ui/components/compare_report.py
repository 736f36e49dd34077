"""The report of a comparison: verdict, figures with their intervals, slices, speed, examples, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import streamlit as st

from workbench.ui import charts, comparison, examples, formats, markup, resources, theme
from workbench.ui.comparison import MetricRow
from workbench.ui.components import (
    confirm,
    example_browser,
    metric_table,
    mlflow_link,
    needs,
    verdict,
    version_card,
)
from workbench.ui.markup import Cell
from workbench.ui.registry_view import CHAMPION

if TYPE_CHECKING:
    from workbench.jobs import Job
    from workbench.ui.resources import PageServices

MAX_CHART_ROWS = 24
MAIN_TAG = "slice"  # of several tags, the one whose slices are drawn


def show(services: PageServices, job: Job) -> None:
    """Render the report of an ended job."""
    result: Mapping[str, Any] = job.result or job.partial or {}
    a, b = str(job.spec.get("a", "A")), str(job.spec.get("b", "B"))
    rows = comparison.rows_of(result.get("metrics"))
    about = f"{b} (B) against {a} (A) on {job.spec.get('dataset')}, n = {max((row.n or 0 for row in rows), default=0):,}"
    if result.get("verdict") is not None:
        st.html(verdict.as_html(result["verdict"], result.get("reasons") or [], about))
    _decide(services, job, result, b)
    figures = metric_table.as_html(rows) + _repeatable(result.get("repeatable"))
    st.html(markup.section("Figures", "the same examples for both; B − A") + figures)
    slices = comparison.rows_of(result.get("slices"))
    _divergence(result.get("divergence"))
    _plot(rows, slices)
    if slices:
        note = f"by {slices[0].metric}, each with its interval; what is proven holds for all of a tag's slices together"
        st.html(markup.section("Slices", note) + _slices(slices))
    speed = comparison.rows_of(result.get("speed"))
    if speed:
        st.html(
            markup.section("Speed", "each version alone, in alternating blocks") + metric_table.as_html(speed)
        )
    _examples(services, job, result, a, b)


def partial(job: Job) -> None:
    """The means of the versions that are evaluated already."""
    means = (job.partial or {}).get("means") or {}
    names = sorted({name for found in means.values() for name in found})
    if names:
        rows = [
            [Cell(name), *(Cell(formats.significant(means.get(side, {}).get(name))) for side in "ab")]
            for name in names
        ]
        st.html(
            markup.section("So far", "means over all examples") + markup.table(["figure", "A", "B"], rows)
        )


def _decide(services: PageServices, job: Job, result: Mapping[str, Any], candidate: str) -> None:
    name, _, number = candidate.partition("/")
    with st.container(horizontal=True):
        if number.isdigit():
            _promote(services, job, result, name, int(number))
        mlflow_link.show(services, result.get("run_id"))


def _promote(services: PageServices, job: Job, result: Mapping[str, Any], name: str, version: int) -> None:
    judged = verdict.label(result.get("verdict"))
    is_proven = verdict.kind_of(result.get("verdict")) == "ok"
    warning = (
        ""
        if is_proven
        else f" The verdict was **{judged}**: promoting it anyway is written into the history."
    )
    confirmed = confirm.show(
        f"Promote v{version}",
        f"Point **@{CHAMPION}** of `{name}` at **v{version}**.{warning} Engines that follow the alias swap to it; *Roll back* undoes it.",
        f"Promote v{version} to @{CHAMPION}", key="compare_promote", primary=is_proven,
    )  # fmt: skip
    if confirmed is not None:
        version_card.promote(services, name, version, f"comparison {job.id}: {judged}")
        st.rerun()
    if confirm.show(
        "Roll back", f"Point **@{CHAMPION}** of `{name}` back at the version that it named before.", f"Roll back {name}", key="compare_rollback"
    ) is not None:  # fmt: skip
        version_card.roll_back(services, name)
        st.rerun()


def _divergence(found: object) -> None:
    """How far B's token distributions lie from A's, where that was measured."""
    if not isinstance(found, Mapping):
        return
    limits = (
        "–"
        if found["low"] is None
        else f"{formats.significant(found['low'])} … {formats.significant(found['high'])}"
    )
    note = f"KL(A ‖ B) along A's answers, exact over the whole vocabulary; n = {found['n']:,}, {found['num_tokens']:,} tokens"
    cells = [
        formats.significant(found["mean_kl"]), limits, formats.significant(found["max_kl"]), f"{found['same_top']:.1%}",
        ", ".join(f"{name} ({formats.significant(kl)})" for name, kl in found["worst"]),
    ]  # fmt: skip
    head = ["nats a token", "interval", "largest", "same top token", "examples that differ most"]
    st.html(
        markup.section("Token distributions", note) + markup.table(head, [[Cell(cell) for cell in cells]])
    )


def _repeatable(found: object) -> str:
    """Whether requests that ran again in another batch gave the same bits."""
    if not isinstance(found, Mapping) or not found.get("checked"):
        return ""
    equal, checked = found["equal"], found["checked"]
    kind, label = ("ok", "bitwise repeatable") if equal == checked else ("bad", "not repeatable")
    told = (
        f"{equal:,} of {checked:,} requests gave the same tokens and log-probabilities again in another batch"
    )
    return f'<p class="q-muted">{markup.chip(kind, label)} {told}</p>'


def _slices(slices: list[MetricRow]) -> str:
    """A table a metric; all but the first folded."""
    metrics = list(dict.fromkeys(row.metric for row in slices))
    tables = {m: metric_table.as_html([row for row in slices if row.metric == m], "slice") for m in metrics}
    first, *others = metrics
    folded = "".join(
        f'<details class="q-doubt"><summary>slices by {markup.text(m)}</summary>{tables[m]}</details>'
        for m in others
    )
    return tables[first] + folded


def _plot(rows: list[MetricRow], slices: list[MetricRow]) -> None:
    """Differences of shares on one axis: every figure, and the slices of the first; other units stay in their table."""
    first = next((row.metric for row in rows if row.is_share), None)
    own = [row for row in slices if row.metric == first]
    named = [row for row in own if row.name.startswith(f"{MAIN_TAG}=")]
    wanted = [*(row for row in rows if row.is_share), *(named or own)]
    shown = [found for row in wanted if (found := comparison.chart_row(row)) is not None]
    if shown:
        figure = charts.intervals(shown[:MAX_CHART_ROWS], "B − A, percentage points", theme.current())
        alt = "Differences with their 95 % intervals"
        st.plotly_chart(figure, theme=None, config=charts.CONFIG, key="intervals", alt=alt)


def _examples(services: PageServices, job: Job, result: Mapping[str, Any], a: str, b: str) -> None:
    st.html(markup.section("Examples", "← and → go on"))
    reading = resources.readings().get(
        ("examples", job.id), lambda: examples.load(services, result), ttl_s=3600.0
    )
    found = needs.value(reading, "The examples")
    if found is not None:
        metrics = {row.name: row.higher_is_better for row in comparison.rows_of(result.get("metrics"))}
        example_browser.show(found, metrics, a, b)
