"""The Overview's live parts: followed aliases, figures, what needs attention, memory, requests and feedback, as they are now."""

from __future__ import annotations

import time
from statistics import median
from typing import TYPE_CHECKING

import streamlit as st

from workbench.ui import formats, glossary, markup, resources, theme
from workbench.ui.components import (
    checklist,
    feedback_table,
    followed_alias,
    live,
    memory_ledger,
    request_table,
    top_bar,
)
from workbench.ui.components.live import Query, Shown
from workbench.ui.markup import Tile
from workbench.ui.step_columns import StepColumns

if TYPE_CHECKING:
    from engine.records import EngineStats, RequestRecord
    from workbench.jobs import Job
    from workbench.ui.components.checklist import Done
    from workbench.ui.components.engine_state import EngineView

NAME = "overview"
EVERY_S = 3.0
FEEDBACK_AGE_S = 10.0
MINUTE_NS = 60_000_000_000


def show(bar: top_bar.Bar, ticked: Done) -> None:
    """Render and keep live; the page runs again when a step of the checklist was ticked."""
    query = Query(NAME, bar.model_id, theme.current())
    now = _shown(bar.view, bar.jobs, ticked, feedback_table.as_html())
    live.show(bar.place, query, now.state, EVERY_S)
    st.html(  # one element: what the browser does for a run grows with their number
        live.slots(now, "overview-aliases", "overview-tiles")
        + '<div class="q-two"><div>'
        + markup.section("Needs attention", "the last ten minutes")
        + live.slots(now, "overview-attention")
        + "</div><div>"
        + markup.section("Memory", glossary.tip("memory ledger"))
        + live.slots(now, "overview-memory")
        + "</div></div>"
        + live.slots(now, "overview-requests", "overview-feedback")
    )


def shown(view: EngineView, jobs: list[Job], query: Query) -> Shown:
    """What is to be seen now; the bar's parts alone when there is no engine."""
    services = resources.services()
    ticked = checklist.done(services) if services else {}
    return _shown(view, jobs, ticked, feedback_table.as_html(FEEDBACK_AGE_S))


def _shown(view: EngineView, jobs: list[Job], ticked: Done, feedback: str) -> Shown:
    bar, worker, stats = top_bar.shown(view, jobs, sorted(ticked.items())), view.worker, view.stats
    if worker is None or stats is None or view.dead:
        return bar
    now = time.monotonic_ns()
    requests, columns = worker.records.requests(), resources.columns(worker)
    columns.refresh()
    html = {
        **bar.html,
        "overview-aliases": followed_alias.as_html(),
        "overview-tiles": markup.tiles(_tiles(view, stats, requests, columns, now)),
        "overview-attention": _attention(stats, requests),
        "overview-memory": memory_ledger.as_html(stats.memory),
        "overview-requests": markup.section(
            "Requests", f"the newest of {len(requests):,} that ended in the last ten minutes"
        )
        + request_table.as_html(requests, now),
        "overview-feedback": feedback,
    }
    return Shown(bar.state, html)


def _tiles(
    view: EngineView, stats: EngineStats, requests: list[RequestRecord], columns: StepColumns, now: int
) -> list[Tile]:
    size = view.card.num_parameters if view.card else None
    rate = float(columns.bins(now - MINUTE_NS, now, 1).values["decode"][0])
    ttft = [x for x in map(request_table.ttft_ms, requests) if x is not None]
    tpot = [x for x in map(request_table.tpot_ms, requests) if x is not None]
    held = stats.num_blocks - stats.num_free_blocks
    return [
        Tile("Model", f"{formats.significant(size / 1e6)} M" if size else formats.UNKNOWN,
             f"parameters, {stats.dtype or 'no dtype'} on {stats.device or 'no device'}"),
        Tile("Running", f"{stats.num_running:,} of {stats.max_num_seqs:,}", f"slots, {stats.num_waiting:,} queued"),
        Tile(f"{markup.term('TTFT')}, median", formats.milliseconds(median(ttft) if ttft else None), f"n = {len(ttft):,}"),
        Tile(f"{markup.term('TPOT')}, median", formats.milliseconds(median(tpot) if tpot else None), f"n = {len(tpot):,}"),
        Tile("Output", formats.significant(rate), "tokens/s, last minute"),
        Tile(f"{markup.term('KV block', 'KV blocks')} held", formats.percent(held, stats.num_blocks),
             f"{held:,} of {stats.num_blocks:,}, {stats.num_cached_blocks:,} cached"),
    ]  # fmt: skip


def _attention(stats: EngineStats, requests: list[RequestRecord]) -> str:
    failed = sum(r.finish_reason.is_failure for r in requests)
    preempted = sum(r.num_preemptions for r in requests)
    held = stats.num_blocks - stats.num_free_blocks
    found = [
        ("bad", f"{stats.step_errors:,} steps failed since the start; see the log.", stats.step_errors),
        ("bad", f"{failed:,} requests ended with an error.", failed),
        ("warn", f"{preempted:,} preemptions: the KV cache is too small for this load.", preempted),
        (
            "warn",
            f"{stats.num_waiting:,} requests are queued: every slot or block is taken.",
            stats.num_waiting,
        ),
        (
            "warn",
            f"{formats.percent(held, stats.num_blocks)} of the KV blocks are held.",
            10 * held > 9 * stats.num_blocks,
        ),
    ]
    shown = [f'<li class="{kind}">{markup.text(told)}</li>' for kind, told, count in found if count]
    return f'<ul class="q-list">{"".join(shown) or "<li>Nothing: no errors, no preemptions, no queue.</li>"}</ul>'
