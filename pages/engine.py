"""Engine: its inside as a picture, live and backwards in time. Reads records and statistics only."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import streamlit as st

from workbench.ui import charts, formats, markup, pace, resources, theme
from workbench.ui.components import (
    block_map,
    engine_state,
    memory_ledger,
    page_errors,
    step_facts,
    step_timeline,
    time_controls,
    top_bar,
    waiting,
)
from workbench.ui.markup import Tile, term

if TYPE_CHECKING:
    from engine.records import EngineStats
    from engine.worker import EngineWorker
    from workbench.ui.components.time_controls import View

REFRESH_S = 2.0
NUM_BINS = 240


def show() -> None:
    bar = top_bar.show()
    st.html(
        markup.title("Engine", "What is it doing with its steps and blocks, now and in the last ten minutes?")
    )
    if not waiting.show(bar) or bar.view.worker is None or bar.view.stats is None:
        return
    columns = resources.columns(bar.view.worker)
    columns.refresh()
    view = time_controls.show(columns)
    if view.at_ns is None:
        _live(bar, view.window_s)
    else:
        _keep_chip(bar)
        _still(bar.view.worker, bar.view.stats, view)


@st.fragment(run_every=pace.every(REFRESH_S))  # type: ignore[untyped-decorator]
@page_errors.shown()
def _live(bar: top_bar.Bar, window_s: int) -> None:
    view = bar.refresh()
    worker, stats = engine_state.show(view), view.stats
    if worker is None or stats is None:
        return
    columns, now = resources.columns(worker), time.monotonic_ns()
    if not columns.refresh():
        st.html(
            markup.panel(
                "info", "No step yet", "Ask something in the Playground, or send a request to the API."
            )
        )
    st.html(markup.tiles(_tiles(stats)))
    bin_ns = window_s * 1_000_000_000 // NUM_BINS
    until = (now // bin_ns + 1) * bin_ns  # whole bins: they do not shimmer
    bins = columns.bins(until - NUM_BINS * bin_ns, until, NUM_BINS)
    left, right = st.columns([1.55, 1], gap="medium")
    with left:
        picked = step_timeline.show(bins, now, stats.num_blocks)
    if picked is not None:
        time_controls.pause_at(picked, now)
        st.rerun()
    with right:
        _blocks(worker, None)
        st.html(markup.section("Memory") + memory_ledger.as_html(stats.memory))


def _still(worker: EngineWorker, stats: EngineStats, view: View) -> None:
    assert view.at_ns is not None
    columns = resources.columns(worker)
    since = view.until_ns - view.window_s * 1_000_000_000
    bins = columns.bins(since, view.until_ns, NUM_BINS)
    step_id = columns.step_at(view.at_ns)
    left, right = st.columns([1.55, 1], gap="medium")
    with left:
        picked = step_timeline.show(bins, view.paused_ns, stats.num_blocks, marker_ns=view.at_ns)
    if picked is not None and abs(picked - view.at_ns) > bins.bin_ns:
        time_controls.pause_at(picked, view.paused_ns)
        st.rerun()
    if step_id is None:
        st.html(
            markup.panel("info", "No step at that time", "Move to a later time, or send a request first.")
        )
        return
    with right:
        _blocks(worker, step_id)
    step_facts.show(worker.records, columns, view.at_ns, view.paused_ns)
    st.html(markup.section("Single steps", "CPU time of the steps around the chosen one"))
    figure = charts.step_times(columns.around(view.at_ns, 60, 60), step_id, theme.current())
    st.plotly_chart(
        figure, theme=None, config=charts.CONFIG, key="step_times", alt="CPU time of single steps"
    )
    step_facts.download(columns, since, view.until_ns)


def _blocks(worker: EngineWorker, step_id: int | None) -> None:
    blocks = worker.records.block_map(step_id)
    if blocks is None:
        st.html(markup.panel("info", "The blocks of that step are not kept any more", "Choose a later one."))
        return
    note = f"after step {blocks.step_id:,}" if blocks.step_id >= 0 else "before the first step"
    st.html(markup.section("KV blocks", note))
    block_map.show(blocks)


def _tiles(stats: EngineStats) -> list[Tile]:
    held = stats.num_blocks - stats.num_free_blocks
    return [
        Tile("Running", f"{stats.num_running:,} of {stats.max_num_seqs:,}", "slots"),
        Tile(term("queue", "Queue"), f"{stats.num_waiting:,}", "waiting requests"),
        Tile(term("KV block", "Blocks held"), f"{held:,} of {stats.num_blocks:,}", f"{stats.num_cached_blocks:,} cached"),
        Tile(term("prefix cache", "Prefix hits"), formats.percent(stats.cached_prompt_tokens, stats.prompt_tokens),
             f"{stats.cached_prompt_tokens:,} of {stats.prompt_tokens:,} prompt tokens"),
        Tile(term("preemption", "Preemptions"), f"{stats.preemptions:,}", "since the start"),
        Tile(term("step", "Steps"), f"{stats.steps:,}", f"{stats.step_errors:,} failed"),
    ]  # fmt: skip


@st.fragment(run_every=pace.every(REFRESH_S))  # type: ignore[untyped-decorator]
@page_errors.shown()
def _keep_chip(bar: top_bar.Bar) -> None:
    bar.refresh()


show()
