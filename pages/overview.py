"""Overview: is it up, what ran lately, what needs attention, and what to do first. Reads state, statistics and records."""

from __future__ import annotations

from typing import TYPE_CHECKING

import streamlit as st

from workbench.ui import markup, resources, site
from workbench.ui.components import checklist, copy_code, overview_live, top_bar, waiting

if TYPE_CHECKING:
    from workbench.ui.components.checklist import Done


def show() -> None:
    bar = top_bar.show()
    with st.container(horizontal=True, vertical_alignment="center"):
        st.html(
            markup.title("Overview", "What is loaded, is it healthy, what ran, what needs me?"),
            width="stretch",
        )
        st.page_link(site.page("playground"), label="**Ask the model something**", icon=":material/forum:")
        st.page_link(site.page("engine"), label="**Watch blocks and steps**", icon=":material/memory:")
    resources.readings().forget(checklist.SUBJECT)  # whoever comes here has perhaps just done a step
    ticked = _first_steps()
    if not waiting.show(bar):
        return
    overview_live.show(bar, ticked)
    st.html(markup.section("Use it from code", "OpenAI's API, on this address"))
    st.code(f"curl {copy_code.base_url(st.context.url)}/models", language="bash")


def _first_steps() -> Done:
    """Render the checklist; what of it is done."""
    services = resources.services()
    if services is None:
        return {}
    ticked = checklist.done(services)
    st.html(checklist.as_html(ticked))
    checklist.show_next(ticked)
    return ticked


show()
