"""Finished requests as a table of figures, newest first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import streamlit as st

from engine.request import FinishReason
from workbench.ui import formats, markup
from workbench.ui.markup import Cell

if TYPE_CHECKING:
    from engine.records import RequestRecord

_TONE = {FinishReason.ERROR: "bad", FinishReason.TIMEOUT: "bad", FinishReason.ABORT: "warn"}


def show(requests: Sequence[RequestRecord], now_ns: int) -> None:
    st.html(as_html(requests, now_ns))


def as_html(requests: Sequence[RequestRecord], now_ns: int, most: int = 10) -> str:
    """The newest `most` of them, or a sentence when there is none."""
    if not requests:
        return '<p class="q-muted">No request has ended yet. The Playground sends the first one with a click.</p>'
    newest = list(requests[-most:])[::-1]
    head = [
        "request", "ended", "ago", "prompt", markup.term("cached tokens", "cached"), "output",
        f"{markup.term('TTFT')}, ms", f"{markup.term('TPOT')}, ms", "total, ms",
    ]  # fmt: skip
    return markup.table(head, (_row(r, now_ns) for r in newest), left=2)


def _row(r: RequestRecord, now_ns: int) -> list[Cell]:
    return [
        Cell(r.request_id[:12], "q-mono"),
        Cell(r.finish_reason.value, _TONE.get(r.finish_reason, "")),
        Cell(formats.ago(now_ns, r.finished_ns)),
        Cell(formats.count(r.num_prompt_tokens)),
        Cell(formats.count(r.num_cached_tokens)),
        Cell(formats.count(r.num_output_tokens)),
        Cell(formats.significant(ttft_ms(r))),
        Cell(formats.significant(tpot_ms(r))),
        Cell(formats.significant((r.finished_ns - r.arrival_ns) / 1e6)),
    ]


def ttft_ms(r: RequestRecord) -> float | None:
    return None if r.first_token_ns is None else (r.first_token_ns - r.arrival_ns) / 1e6


def tpot_ms(r: RequestRecord) -> float | None:
    if r.first_token_ns is None or len(r.token_ns) < 2:
        return None
    return (r.token_ns[-1] - r.token_ns[0]) / 1e6 / (len(r.token_ns) - 1)
