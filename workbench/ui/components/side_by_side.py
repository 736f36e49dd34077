"""Which versions are asked: the top bar's first, up to three more beside it, bound to the page's address."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import streamlit as st

from workbench.ui import markup
from workbench.ui.components import top_bar

if TYPE_CHECKING:
    from workbench.resident import Resident

MAX_BESIDE = 3
KEY = "beside"


def show(choices: Mapping[str, Resident], first: str | None) -> dict[str, Resident]:
    """Render the choice where there is one; all chosen versions by what requests call them, `first` before the others."""
    choices = {name: resident for name, resident in choices.items() if resident.task == "generate"}
    others = {name: resident for name, resident in choices.items() if name != first}
    labels = {name: top_bar.option_label(name, resident) for name, resident in others.items()}
    gone = [label for label in st.query_params.get_all(KEY) if label and label not in labels.values()]
    beside: list[str] = []
    if others:
        beside = st.multiselect(
            "Side by side with", list(others), format_func=lambda name: labels[name], key=KEY, bind="query-params",
            max_selections=MAX_BESIDE, select_all=False, placeholder="Side by side with up to three others", label_visibility="collapsed",
        )  # fmt: skip
    if gone:
        st.html(markup.chip("warn", f"not loaded here: {', '.join(gone)}"))
    return {name: choices[name] for name in (first, *beside) if name is not None and name in choices}
