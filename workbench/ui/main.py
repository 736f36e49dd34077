"""The site's script: page settings, styles, navigation. Streamlit runs it on every visit and every rerun."""

from __future__ import annotations

import streamlit as st

from workbench.ui import markup, site, theme
from workbench.ui.components import page_errors


def run() -> None:
    st.set_page_config(page_title="Quire", page_icon="🗂️", layout="wide")
    st.html(markup.stylesheet(theme.current()))
    page = st.navigation([site.page(entry.name) for entry in site.ENTRIES], position="top")
    with page_errors.shown():
        page.run()


run()
