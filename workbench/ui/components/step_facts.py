"""One recorded step in words and figures, and the window's steps as a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import streamlit as st

from workbench.ui import formats, markup
from workbench.ui.markup import Cell, Tile, term
from workbench.ui.step_columns import StepColumns

if TYPE_CHECKING:
    from engine.record_log import RecordLog
    from engine.records import StepRecord

MAX_ROWS = 12
_CSV = ("step_id", "prefill", "decode", "rows", "schedule", "prepare", "forward", "sample", "running", "waiting",
        "free", "cached", "preempted", "cached_tokens")  # fmt: skip


def show(records: RecordLog, columns: StepColumns, at_ns: int, now_ns: int) -> StepRecord | None:
    """Render the last step that had ended at `at_ns`; that step."""
    ended_ns = columns.neighbour(at_ns, 0)
    found = records.steps(since_ns=ended_ns, until_ns=ended_ns) if ended_ns is not None else []
    if not found:
        return None
    step = found[-1]
    st.html(markup.tiles(_tiles(step, now_ns)))
    if step.error:
        st.html(markup.panel("bad", f"Step {step.step_id} failed", step.error))
    st.html(_rows(step))
    return step


def _tiles(step: StepRecord, now_ns: int) -> list[Tile]:
    total = step.schedule_ms + step.prepare_ms + step.forward_ms + step.sample_ms
    hits = sum(n for _, n in step.prefix_hits)
    back = f", {step.num_blocks_back} blocks from host memory" if step.num_blocks_back else ""
    return [
        Tile(
            term("step", "Step"),
            f"{step.step_id:,}",
            f"{(now_ns - step.ended_ns) / 1e9:.1f} s before the pause",
        ),
        Tile(term("prefill", "Prefill"), f"{step.num_prefill_tokens:,}", "tokens"),
        Tile(term("decode", "Decode"), f"{step.num_decode_tokens:,}", f"tokens{_guesses(step)}"),
        Tile("CPU time", formats.milliseconds(total), f"forward {formats.significant(step.forward_ms)} ms"),
        Tile(term("queue", "Queue"), f"{step.num_waiting:,}", f"{step.num_running:,} running"),
        Tile(
            term("prefix cache", "Prefix hits"), f"{hits:,}", f"tokens{back}; {len(step.preempted)} preempted"
        ),
    ]


def _guesses(step: StepRecord) -> str:
    if not step.num_draft_tokens:
        return ""
    return f", {step.num_accepted_tokens:,} of {step.num_draft_tokens:,} guesses right"


def _rows(step: StepRecord) -> str:
    hits = dict(step.prefix_hits)
    rows = [
        [Cell(request_id[:12], "q-mono"), Cell("prefill" if n > 1 and step.num_prefill_tokens else "decode"), Cell(f"{n:,}"),
         Cell(f"{hits[request_id]:,}" if request_id in hits else "")]
        for request_id, n in step.rows[:MAX_ROWS]
    ]  # fmt: skip
    more = (
        f"the first {MAX_ROWS} of {len(step.rows):,}" if len(step.rows) > MAX_ROWS else f"{len(step.rows):,}"
    )
    head = ["request", "kind", "tokens", markup.term("cached tokens", "cached")]
    return markup.section("Rows of this step", more) + markup.table(head, rows, left=2)


def download(columns: StepColumns, since_ns: int, until_ns: int) -> None:
    """A button that saves the window's steps as CSV; the file is made on click."""
    st.download_button(
        "Download these steps (CSV)",
        data=lambda: csv(columns, since_ns, until_ns),
        file_name="quire-steps.csv",
        mime="text/csv",
        on_click="ignore",
    )


def csv(columns: StepColumns, since_ns: int, until_ns: int) -> str:
    """One line a step, times in ms from the window's start."""
    window = columns.window(since_ns, until_ns)
    lines = ["ended_ms," + ",".join(_CSV)]
    ended = (window["ended_ns"] - since_ns) / 1e6
    table = np.column_stack([ended, *(window[name] for name in _CSV)])
    lines += [
        ",".join(f"{value:.6g}" if value % 1 else str(int(value)) for value in row) for row in table.tolist()
    ]
    return "\n".join(lines) + "\n"
