"""Overview: is it up, what ran lately, what needs attention, and what to do first. Reads state, statistics and records."""

from __future__ import annotations

import time
from statistics import median
from typing import TYPE_CHECKING

import streamlit as st

from engine.request import FinishReason
from workbench.ui import formats, glossary, markup, pace, resources, site
from workbench.ui.components import (
    checklist,
    copy_code,
    engine_state,
    feedback_table,
    followed_alias,
    memory_ledger,
    page_errors,
    request_table,
    top_bar,
    waiting,
)
from workbench.ui.markup import Tile
from workbench.ui.step_columns import StepColumns

if TYPE_CHECKING:
    from engine.records import EngineStats, RequestRecord
    from workbench.ui.components.engine_state import EngineView

REFRESH_S = 4.0
STEPS_REFRESH_S = 10.0  # coming to the page reads it anew
MINUTE_NS, NS_PER_MS = 60_000_000_000, 1_000_000


def show() -> None:
    bar = top_bar.show()
    with st.container(horizontal=True, vertical_alignment="center"):
        st.html(
            markup.title("Overview", "What is loaded, is it healthy, what ran, what needs me?"),
            width="stretch",
        )
        st.page_link(site.page("playground"), label="**Ask the model something**", icon=":material/forum:")
        st.page_link(site.page("engine"), label="**Watch blocks and steps**", icon=":material/memory:")
    resources.readings().forget(checklist.SUBJECT)  # whoever comes here has perhaps just done a step
    _first_steps()
    if not waiting.show(bar):
        return
    _live(bar)
    st.html(markup.section("Use it from code", "OpenAI's API, on this address"))
    st.code(f"curl {copy_code.base_url(st.context.url)}/models", language="bash")


@st.fragment(run_every=pace.every(STEPS_REFRESH_S))  # type: ignore[untyped-decorator]
@page_errors.shown()
def _first_steps() -> None:
    """The checklist, kept fresh while something of it is left to do."""
    services = resources.services()
    if services is None:
        return
    ticked = checklist.done(services)
    st.html(checklist.as_html(ticked))
    checklist.show_next(ticked)


@st.fragment(run_every=pace.every(REFRESH_S))  # type: ignore[untyped-decorator]
@page_errors.shown()
def _live(bar: top_bar.Bar) -> None:
    view = bar.refresh()
    worker, stats = engine_state.show(view), view.stats
    if worker is None or stats is None:
        return
    now = time.monotonic_ns()
    requests, columns = worker.records.requests(), resources.columns(worker)
    columns.refresh()
    st.html(  # one element: what the browser does for a refresh grows with their number
        followed_alias.as_html()
        + markup.tiles(_tiles(view, stats, requests, columns, now))
        + '<div class="q-two"><div>'
        + markup.section("Needs attention", "the last ten minutes")
        + _attention(stats, requests)
        + "</div><div>"
        + markup.section("Memory", glossary.tip("memory ledger"))
        + memory_ledger.as_html(stats.memory)
        + "</div></div>"
        + markup.section("Requests", f"the newest of {len(requests):,} that ended in the last ten minutes")
        + request_table.as_html(requests, now)
        + feedback_table.as_html()
    )


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
    failed = sum(r.finish_reason is FinishReason.ERROR for r in requests)
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


show()
