"""The memory ledger: what the engine's bytes are for, as one bar with its key."""

from __future__ import annotations

from typing import TYPE_CHECKING

import streamlit as st

from workbench.ui import formats, markup

if TYPE_CHECKING:
    from engine.records import MemoryLedger


def show(ledger: MemoryLedger | None) -> None:
    st.html(as_html(ledger))


def as_html(ledger: MemoryLedger | None) -> str:
    """The bar and its key, or a sentence when the engine keeps none."""
    if ledger is None:
        return '<p class="q-muted">This engine keeps no ledger: it has no device memory of its own.</p>'
    parts = [
        ("weights", ledger.weights_bytes, "var(--q-c0)"),
        ("KV cache", ledger.kv_bytes, "var(--q-c2)"),
        ("workspace", ledger.workspace_bytes, "var(--q-c1)"),
    ]
    used = sum(size for _, size, _ in parts)
    bar = "".join(
        f'<i style="width:{100 * size / max(used, 1):.3f}%;background:{colour}"></i>'
        for _, size, colour in parts
    )
    key = "".join(
        f'<span style="--c:{colour}">{label} <b>{formats.bytes_of(size)}</b></span>'
        for label, size, colour in parts
    )
    whole = f"{formats.bytes_of(used)} in all, {formats.percent(used, ledger.total_bytes)} of {formats.bytes_of(ledger.total_bytes)}"
    return (
        f'<div class="q-ledger" role="img" aria-label="{markup.text(whole)}">{bar}</div>'
        f'<div class="q-key">{key}<em class="q-muted">{markup.text(whole)} on {markup.text(ledger.device)}</em></div>'
    )
