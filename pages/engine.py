"""Engine: its inside as a picture, live and backwards in time. Reads records and statistics only."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import streamlit as st

from workbench.ui import charts, markup, resources, theme
from workbench.ui.components import (
    block_map,
    engine_live,
    limit_bar,
    step_facts,
    step_timeline,
    time_controls,
    top_bar,
    waiting,
)

if TYPE_CHECKING:
    from engine.records import EngineStats
    from engine.worker import EngineWorker
    from workbench.ui.components.time_controls import View


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
    if view.at_ns is not None:
        bar.keep_live()
        _still(bar.view.worker, bar.view.stats, view)
        return
    picked = engine_live.show(bar, view.window_s)
    if picked is not None:
        time_controls.pause_at(picked, time.monotonic_ns())
        st.rerun()


def _still(worker: EngineWorker, stats: EngineStats, view: View) -> None:
    assert view.at_ns is not None
    columns = resources.columns(worker)
    since = view.until_ns - view.window_s * 1_000_000_000
    bins = columns.bins(since, view.until_ns, engine_live.NUM_BINS)
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
        blocks = worker.records.block_map(step_id)
        if blocks is None:
            st.html(
                markup.panel("info", "The blocks of that step are not kept any more", "Choose a later one.")
            )
        else:
            st.html(block_map.heading(blocks))
            block_map.show(blocks)
    st.html(limit_bar.as_html(worker, columns, since, view.until_ns))
    step_facts.show(worker.records, columns, view.at_ns, view.paused_ns)
    st.html(markup.section("Single steps", "CPU time of the steps around the chosen one"))
    figure = charts.step_times(columns.around(view.at_ns, 60, 60), step_id, theme.current())
    st.plotly_chart(
        figure, theme=None, config=charts.CONFIG, key="step_times", alt="CPU time of single steps"
    )
    step_facts.download(columns, since, view.until_ns)


show()
