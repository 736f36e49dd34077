"""The bar on top of every page: version picker, what the version was trained for, engine chip.

The chip is a slot that a page's live fragment fills again (`Bar.refresh`), so that no page runs a second fragment for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import streamlit as st

from workbench.ui import glossary, markup, resources
from workbench.ui.components import engine_state
from workbench.ui.components.engine_state import EngineView

if TYPE_CHECKING:
    from streamlit.delta_generator import DeltaGenerator

    from workbench.host import ModelCard


@dataclass(slots=True)
class Bar:
    """The rendered bar."""

    model_id: str | None
    view: EngineView
    chip: DeltaGenerator

    def refresh(self) -> EngineView:
        """Read the engine's state again and show it in the chip.

        Always writes: what a fragment does not write again outside of itself, Streamlit takes away.
        """
        self.view = engine_state.read(self.model_id)
        self.chip.html(engine_state.chip(self.view))
        return self.view


def show() -> Bar:
    """Render the bar; the chosen model and the engine's state."""
    cards = {card.id: card for card in resources.host().models()}
    picker, about, status = st.columns([3, 5, 2.4], vertical_alignment="top")
    with picker:
        model_id = _pick(cards)
    with about:
        st.html(_about(cards.get(model_id or "")))
    with status:
        slot = st.empty()
    bar = Bar(model_id, engine_state.read(model_id), slot)
    bar.refresh()
    return bar


def _pick(cards: dict[str, ModelCard]) -> str | None:
    if not cards:
        st.selectbox("Version", ["no model yet"], disabled=True, key="model_none")
        return None
    chosen: str | None = st.selectbox(
        "Version",
        list(cards),
        format_func=lambda model_id: option_label(cards[model_id]),
        key="model",
        bind="query-params",
        help=f"Its identity is the digest. {glossary.tip('digest')}",
    )
    return chosen


def option_label(card: ModelCard) -> str:
    """Title and the first eight of the digest; the title says "demo" where it is one."""
    return f"{card.title} · {card.digest[:8]}" if card.digest else card.title


def _about(card: ModelCard | None) -> str:
    if card is None:
        return '<div class="q-trained">The picker fills when the model is known.</div>'
    badge = '<span class="q-badge">demo</span>' if card.is_demo else ""
    told = f"Trained for {card.trained_for}" if card.trained_for else card.description
    return f'<div class="q-trained">{badge}{markup.text(told)}</div>'
