"""Settings: who may use this server, who changed it, and what it runs on."""

from __future__ import annotations

import streamlit as st

from workbench.ui import markup
from workbench.ui.components import needs, settings_sections, top_bar


def show() -> None:
    top_bar.show()
    st.html(markup.title("Settings", "Who may use this server, who changed it, and what does it run on?"))
    services = needs.services()
    if services is None:
        return
    for section in settings_sections.SECTIONS:
        section(services)


show()
