"""Wins, losses and ties example by example, side by side with what differs from the expected answer. The arrow keys go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import streamlit as st

from workbench.ui import examples, formats, markup
from workbench.ui.components import text_diff
from workbench.ui.examples import Judged, Outcome

if TYPE_CHECKING:
    from workbench.evals.report import PairRow

_LABELS: dict[Outcome, str] = {"win": "B wins", "loss": "B loses", "tie": "ties"}
ALL = "all"


def show(rows: Sequence[PairRow], metrics: Mapping[str, bool], name_a: str, name_b: str) -> None:
    """Render filters, the example at the current place, and the buttons to the next ones.

    `metrics`: by name, whether higher is better; the first is shown first.
    """
    if not rows or not metrics:
        st.html('<p class="q-muted">The comparison kept no table of examples.</p>')
        return
    with st.container(horizontal=True, vertical_alignment="bottom"):
        metric = st.selectbox(
            "Judged by", list(metrics), key="judge", bind="query-params", on_change=_to_first, width=200
        )
        judged = examples.judge(rows, metric, metrics[metric])
        counted = examples.counts(judged)
        outcome = st.segmented_control(
            "Examples", [ALL, *_LABELS], default=ALL, key="outcome", bind="query-params", required=True, on_change=_to_first,
            format_func=lambda o: "all" if o == ALL else _LABELS[o],
        )  # fmt: skip
        slices = sorted({tag for row in rows for tag in examples.slices_of(row)})
        tag = st.selectbox(
            "Slice", slices, index=None, key="slice", bind="query-params", placeholder="every slice", on_change=_to_first,
            width=240,
        )  # fmt: skip
    told = ", ".join(f"{_LABELS[o]}: {counted[o]:,}" for o in examples.OUTCOMES)
    st.html(f'<div class="q-figures"><span>{told}, n = {len(rows):,}</span></div>')
    found = examples.chosen(judged, None if outcome == ALL else outcome, tag)
    if not found:
        st.html('<p class="q-muted">No example is like that.</p>')
        return
    _one(found, name_a, name_b)


def _one(found: Sequence[Judged], name_a: str, name_b: str) -> None:
    state = st.session_state
    if "place" in state:  # else the address may name it
        state.place = min(max(int(state.place), 1), len(found))
    with st.container(horizontal=True, vertical_alignment="bottom"):
        place = st.number_input(
            f"Example, of {len(found):,}", 1, len(found), key="place", bind="query-params", width=150
        )
        st.button(
            "Back",
            key="example_back",
            shortcut="Left",
            on_click=_move,
            args=(-1, len(found)),
            disabled=place == 1,
        )
        st.button(
            "Next",
            key="example_next",
            shortcut="Right",
            on_click=_move,
            args=(1, len(found)),
            disabled=place == len(found),
        )
    st.html(heading(found[place - 1]) + sides(found[place - 1], name_a, name_b))


def heading(judged: Judged) -> str:
    row = judged.row
    tags = "".join(f"<span>{markup.text(tag)}</span>" for tag in examples.slices_of(row))
    return (
        f'<div class="q-figures"><span class="q-mono">{markup.text(row.example_id)}</span>'
        f"<span><b>{markup.text(_LABELS[judged.outcome])}</b></span>{tags}</div>"
        f'<div class="q-answer q-question">{markup.text(row.question)}</div>'
    )


def sides(judged: Judged, name_a: str, name_b: str) -> str:
    """Expected, A and B; what differs from the expected answer is marked in A and B, else what differs between the two."""
    row = judged.row
    a, b = text_diff.readable(row.output_a), text_diff.readable(row.output_b)
    side_a, side_b = _side("A", name_a, judged.score_a, a), _side("B", name_b, judged.score_b, b)
    if not row.expected:
        return text_diff.as_html([(side_a, b), (side_b, a)])
    expected = text_diff.readable(row.expected)
    return text_diff.as_html(
        [(text_diff.Side("Expected", expected), None), (side_a, expected), (side_b, expected)]
    )


def _side(letter: str, name: str, score: float | None, text: str) -> text_diff.Side:
    told = f'{letter}: {markup.text(name)} <span class="q-muted">score {formats.significant(score)}</span>'
    return text_diff.Side(told, text)


def _move(by: int, most: int) -> None:
    st.session_state.place = min(max(int(st.session_state.get("place", 1)) + by, 1), most)


def _to_first() -> None:
    st.session_state.place = 1
