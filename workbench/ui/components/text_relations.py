"""What a model that reads texts whole is good for, in the place of a chat: how alike texts are, and which documents fit a query.

The work runs as an action; the page shows its result when it is there.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import streamlit as st

from engine.pooling import SCORE, PoolingParams
from workbench.access.principal import Right
from workbench.ui import charts, markup, resources, theme, who
from workbench.ui.components import action_state

if TYPE_CHECKING:
    from engine.embedding import Relevance
    from engine.worker import EngineWorker

MAX_TEXTS = 24  # more could not be read in one picture
SIMILARITY, RANKING = "Similarity", "Ranking"
CUT = PoolingParams(truncate_prompt_tokens=-1)
_EXAMPLES = (
    "The cat sleeps on the sofa.",
    "A kitten is napping on the couch.",
    "The train to Ulm leaves at noon.",
    "When does the next train depart?",
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was found for texts: cosines [n, n] between them, or their relevance to a query."""

    model: str
    texts: tuple[str, ...]
    cosines: tuple[tuple[float, ...], ...] = ()
    ranking: tuple[Relevance, ...] = ()
    query: str = ""


def show(worker: EngineWorker, model: str) -> None:
    """Render inputs and the last result for a model whose task is not to generate."""
    task = worker.pooling.task
    if task not in (SCORE, "embed"):
        told = f"It tells {worker.pooling.num_labels} labels of a text apart, which no page shows yet. Choose another version above."
        st.html(markup.panel("info", "This model is a classifier", told))
        return
    view = RANKING
    if task == "embed":
        chosen = st.segmented_control(
            "What to find", [SIMILARITY, RANKING], default=SIMILARITY, key="relations_view", required=True
        )
        view = chosen or SIMILARITY
    key = st.session_state.setdefault("relations_key", f"relations_{secrets.token_hex(8)}")
    _form(worker, model, view, key)
    action_state.show(key)
    action = resources.actions().get(key)
    found = action.result if action is not None and not action.running and action.error is None else None
    if found is None or found.model != model or bool(found.ranking) != (view == RANKING):
        if action is None or not action.running:
            st.html('<p class="q-muted">Nothing read yet. Write one text a line, or take the example.</p>')
        return
    if found.ranking:
        _ranking(found, is_cosine=task == "embed")
    else:
        _similarity(found)


def _form(worker: EngineWorker, model: str, view: str, key: str) -> None:
    st.button("Take the example", key="relations_example", on_click=_fill, args=(view,))
    with st.form("relations", border=False):
        query = st.text_input("Query", key="relations_query") if view == RANKING else ""
        label = "Documents, one a line" if view == RANKING else "Texts, one a line"
        lines = st.text_area(label, key="relations_texts", height=150)
        sent = st.form_submit_button(
            "Rank" if view == RANKING else "Compare",
            key="relations_go",
            type="primary",
            disabled=who.lacks(Right.INFER) is not None,
            help=who.lacks(Right.INFER),
        )
    if not sent:
        return
    texts = tuple(line.strip() for line in (lines or "").splitlines() if line.strip())
    query = (query or "").strip()
    problem = _problem(texts, query, view)
    if problem:
        st.html(markup.panel("warn", "Nothing was sent", problem))
    elif view == RANKING:
        action_state.start(
            key, f"Rank {len(texts)} documents", lambda: _rank(worker, model, query, texts), right=Right.INFER
        )
    else:
        action_state.start(
            key, f"Compare {len(texts)} texts", lambda: _compare(worker, model, texts), right=Right.INFER
        )


def _fill(view: str) -> None:
    st.session_state.relations_texts = "\n".join(_EXAMPLES[: 3 if view == RANKING else 4])
    st.session_state.relations_query = _EXAMPLES[3]


def _problem(texts: Sequence[str], query: str, view: str) -> str:
    if view == RANKING and not query:
        return "Write a query."
    if len(texts) < 2:
        return "Write at least two lines."
    return (
        f"{len(texts)} lines are more than the {MAX_TEXTS} that are shown." if len(texts) > MAX_TEXTS else ""
    )


def _compare(worker: EngineWorker, model: str, texts: tuple[str, ...]) -> Outcome:
    from engine.embedding import cosine, embed

    vectors = [each.vector for each in embed(worker, texts, CUT)]
    return Outcome(model, texts, tuple(tuple(cosine(a, b) for b in vectors) for a in vectors))


def _rank(worker: EngineWorker, model: str, query: str, texts: tuple[str, ...]) -> Outcome:
    from engine.embedding import rerank

    return Outcome(model, texts, ranking=tuple(rerank(worker, query, texts, CUT)), query=query)


def _similarity(found: Outcome) -> None:
    values = np.array(found.cosines)
    apart = values[~np.eye(len(values), dtype=bool)]
    i, j = np.unravel_index(np.argmax(np.where(np.eye(len(values)), -2, values)), values.shape)
    st.html(
        f"<p>Most alike: <b>{markup.text(found.texts[int(i)])}</b> and <b>{markup.text(found.texts[int(j)])}</b>, "
        f"cosine {values[i, j]:.3f}; the median pair has {np.median(apart):.3f} "
        f'<span class="q-muted">(n = {len(apart) // 2})</span></p>'
    )
    figure = charts.heat_map(values, found.texts, "cosine", theme.current())
    st.plotly_chart(
        figure,
        theme=None,
        config=charts.CONFIG,
        key="relations_map",
        alt=f"Cosines between {len(values)} texts",
    )


def _ranking(found: Outcome, *, is_cosine: bool) -> None:
    scores = [each.score for each in found.ranking]
    is_logit = min(scores) < 0 or max(scores) > 1
    measure = "cosine" if is_cosine else "logit" if is_logit else "relevance, 0 to 1"
    low, high = (
        (min(scores), max(max(scores), min(scores) + 1e-9)) if is_logit and not is_cosine else (0.0, 1.0)
    )
    st.html(markup.section(f"Documents for “{found.query}”", measure))
    rows = [
        [
            str(place),
            markup.text(found.texts[each.index]),
            f"{each.score:.3f}",
            f'<div class="q-meter"><i style="width:{100 * min(1.0, max(0.0, (each.score - low) / (high - low))):.1f}%"></i></div>',
            str(each.num_prompt_tokens),
        ]
        for place, each in enumerate(found.ranking, 1)
    ]
    st.html(markup.html_table(["#", "document", measure, "", "tokens"], rows, left=2, css="wrap"))
