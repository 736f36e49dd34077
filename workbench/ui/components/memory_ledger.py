"""The memory ledger: what the device's bytes are for, as one bar with its key."""

from __future__ import annotations

from typing import TYPE_CHECKING

import streamlit as st

from workbench.ui import formats, markup

if TYPE_CHECKING:
    from engine.records import MemoryLedger


def show(ledger: MemoryLedger | None, kv_cache_dtype: str = "") -> None:
    st.html(as_html(ledger, kv_cache_dtype))


def as_html(ledger: MemoryLedger | None, kv_cache_dtype: str = "") -> str:
    """The bar and its key, or a sentence when the engine keeps none. Parts of no bytes are left out."""
    if ledger is None:
        return '<p class="q-muted">This engine keeps no ledger: it has no device memory of its own.</p>'
    is_own = ledger.device == "cpu"  # the host tier is in the device's own memory
    parts = [
        ("weights", ledger.weights_bytes, "var(--q-c0)"),
        (f"KV cache {markup.text(kv_cache_dtype)}".rstrip(), ledger.kv_bytes, "var(--q-c2)"),
        ("host tier", ledger.host_tier_bytes if is_own else 0, "var(--q-c4)"),
        ("workspace", ledger.workspace_bytes, "var(--q-c1)"),
        ("graphs", ledger.graphs_bytes, "var(--q-c3)"),
        ("others", ledger.other_bytes, "var(--q-cached)"),
        ("free", ledger.free_bytes, "var(--q-surface)"),
    ]
    parts = [part for part in parts if part[1]]
    used, total = ledger.engine_bytes, ledger.total_bytes
    text = f"{formats.bytes_of(used)} in all, {formats.percent(used, total)} of {formats.bytes_of(total)}"
    beside = ""
    if ledger.host_tier_bytes and not is_own:
        beside = f"<span>host tier <b>{formats.bytes_of(ledger.host_tier_bytes)}</b> in host memory</span>"
    beside += f'<em class="q-muted">{markup.text(text)} on {markup.text(ledger.device)}</em>'
    return markup.stacked_bar(parts, lambda size: formats.bytes_of(int(size)), label=text, beside=beside)
