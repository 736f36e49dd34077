"""What stands where the page would be while there is no engine: progress that goes on by itself, or the reason."""

from __future__ import annotations

import streamlit as st

from workbench.ui.components import engine_state, page_errors
from workbench.ui.components.top_bar import Bar


def show(bar: Bar) -> bool:
    """Render a notice unless the engine is ready; whether the page can go on. Reruns the page when that changes."""
    if bar.view.worker is not None and not bar.view.dead:
        return True
    if bar.view.loading:
        _watch(bar)
    else:
        engine_state.show(bar.view)
    return False


@st.fragment(run_every=0.5)  # type: ignore[untyped-decorator]
@page_errors.shown()
def _watch(bar: Bar) -> None:
    view = bar.refresh()
    if not view.loading:
        st.rerun()
    engine_state.show(view)
