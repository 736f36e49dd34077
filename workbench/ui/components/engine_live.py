"""The Engine page's live parts: tiles, the machine's limit, timeline, block map and memory, as they are now."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import streamlit as st

from workbench.resident_format import format_of, told
from workbench.ui import formats, markup, resources, theme
from workbench.ui.components import (
    block_map,
    limit_bar,
    live,
    memory_ledger,
    sleep_button,
    step_timeline,
    top_bar,
)
from workbench.ui.components.live import Query, Shown
from workbench.ui.markup import Tile, term

if TYPE_CHECKING:
    from engine.records import EngineStats
    from workbench.jobs import Job
    from workbench.ui.components.engine_state import EngineView

NAME = "engine"
EVERY_S = 1.0
NUM_BINS = 240


def show(bar: top_bar.Bar, window_s: int) -> int | None:
    """Render and keep live; the time (monotonic ns) that was picked on the timeline in this run, or None."""
    query = Query(NAME, bar.model_id, theme.current(), window_s)
    now = shown(bar.view, bar.jobs, query)
    live.show(bar.place, query, now.state, EVERY_S)
    st.html(live.slots(now, "engine-note", "engine-tiles"))
    limit, button = st.columns([5, 1], gap="medium", vertical_alignment="bottom")
    with limit:
        st.html(live.slots(now, "engine-limit"))
    with button:
        limit_bar.measure_button(bar.view)
        if bar.view.card is not None:
            sleep_button.show(resources.host().find(bar.view.card.id), "engine")
    left, right = st.columns([1.55, 1], gap="medium")
    with left:
        picked = step_timeline.show_payload(now.data["timeline"], now.at_s or 0.0)
    with right:
        st.html(live.slots(now, "engine-blocks"))
        if "block_map" in now.data:
            block_map.show_payload(now.data["block_map"])
        st.html(markup.section("Memory", _form(bar)) + live.slots(now, "engine-memory"))
    return picked


def _form(bar: top_bar.Bar) -> str:
    """How weights and cache are stored, and which adapters the engine serves."""
    card = bar.view.card
    resident = resources.host().find(card.id) if card is not None else None
    if resident is None:
        return ""
    engine = resources.host().find(resident.parent) if resident.parent else resident
    adapters = f"; adapters: {', '.join(engine.adapters)}" if engine.adapters else ""
    return told(format_of(engine)) + adapters


def shown(view: EngineView, jobs: list[Job], query: Query) -> Shown:
    """What is to be seen now; the bar's parts alone when there is no engine."""
    bar, worker, stats = top_bar.shown(view, jobs), view.worker, view.stats
    if worker is None or stats is None or view.dead:
        return bar
    columns = resources.columns(worker)
    num_steps = columns.refresh()
    bin_ns = query.window_s * 1_000_000_000 // NUM_BINS
    until = (time.monotonic_ns() // bin_ns + 1) * bin_ns  # whole bins: they do not shimmer
    bins = columns.bins(until - NUM_BINS * bin_ns, until, NUM_BINS)
    blocks = worker.records.block_map()
    data: dict[str, Any] = {"timeline": step_timeline.payload(bins, until, stats.num_blocks, query.theme)}
    if blocks is not None:
        data["block_map"] = block_map.payload(blocks, query.theme)
    html = {
        **bar.html,
        "engine-note": "" if num_steps else _NO_STEP,
        "engine-tiles": markup.tiles(_tiles(stats)),
        "engine-limit": limit_bar.as_html(worker, columns, until - query.window_s * 1_000_000_000, until),
        "engine-blocks": block_map.heading(blocks) if blocks is not None else markup.section("KV blocks"),
        "engine-memory": memory_ledger.as_html(stats.memory, stats.kv_cache_dtype),
    }
    return Shown(bar.state, html, data, until / 1e9)


_NO_STEP = markup.panel(
    "info", "No step yet", "Ask something in the Playground, or send a request to the API."
)


def _tiles(stats: EngineStats) -> list[Tile]:
    held = stats.num_blocks - stats.num_free_blocks
    kept = f", {stats.num_cached_host_blocks:,} in host memory" if stats.num_host_blocks else ""
    tiles = [
        Tile("Running", f"{stats.num_running:,} of {stats.max_num_seqs:,}", "slots"),
        Tile(term("queue", "Queue"), f"{stats.num_waiting:,}", "waiting requests"),
        Tile(term("KV block", "Blocks held"), f"{held:,} of {stats.num_blocks:,}", f"{stats.num_cached_blocks:,} cached{kept}"),
        Tile(term("prefix cache", "Prefix hits"), formats.percent(stats.cached_prompt_tokens, stats.prompt_tokens),
             f"{stats.cached_prompt_tokens:,} of {stats.prompt_tokens:,} prompt tokens"),
        Tile(term("preemption", "Preemptions"), f"{stats.preemptions:,}", "since the start"),
        Tile(term("step", "Steps"), f"{stats.steps:,}", f"{stats.step_errors:,} failed"),
    ]  # fmt: skip
    if stats.draft_tokens:
        gains = [
            f"{gain:.2f} × the tokens/s (rows: {rows:,})"
            for rows, gain in sorted(stats.speculation_gains.items())
        ]
        source = "a draft model" if stats.speculation_method == "draft_model" else "n-grams"
        guessed = f"{stats.accepted_tokens:,} of {stats.draft_tokens:,} tokens guessed by {source}"
        right = ", ".join([guessed, *gains[:1]])
        tiles.append(
            Tile(
                term("speculation", "Guesses right"),
                formats.percent(stats.accepted_tokens, stats.draft_tokens),
                right,
            )
        )
    return tiles
