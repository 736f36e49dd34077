"""The pages of the site: where they are and how they are called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import streamlit as st

from workbench.settings import resource_root

if TYPE_CHECKING:
    from streamlit.navigation.page import StreamlitPage


@dataclass(frozen=True, slots=True)
class Entry:
    name: str  # file name in pages/ and path in the address
    title: str
    icon: str
    default: bool = False


ENTRIES = (
    Entry("overview", "Overview", ":material/dashboard:", default=True),
    Entry("playground", "Playground", ":material/forum:"),
    Entry("engine", "Engine", ":material/memory:"),
    Entry("benchmark", "Benchmark", ":material/speed:"),
    Entry("versions", "Versions", ":material/account_tree:"),
    Entry("compare", "Compare", ":material/compare_arrows:"),
    Entry("fleet", "Fleet", ":material/hub:"),
    Entry("runs", "Runs", ":material/schedule:"),
    Entry("settings", "Settings", ":material/settings:"),
)


def page(name: str) -> StreamlitPage:
    """The page of that name, for navigation and links. Raises KeyError."""
    entry = {e.name: e for e in ENTRIES}[name]
    path = resource_root() / "pages" / f"{entry.name}.py"
    return st.Page(path, title=entry.title, icon=entry.icon, url_path=entry.name, default=entry.default)
