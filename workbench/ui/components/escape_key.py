"""The Escape key, wherever the focus is: a button's own shortcut does not fire while somebody's cursor is in the chat box."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

_SCRIPT = """
export default function ({ parentElement, setTriggerValue }) {
  const onKey = (event) => { if (event.key === "Escape") setTriggerValue("pressed", true); };
  document.addEventListener("keydown", onKey);
  return () => document.removeEventListener("keydown", onKey);
}
"""


def show(key: str) -> bool:
    """Listen while it is rendered; whether Escape was pressed since the last run."""
    return bool(_component()(key=key, on_pressed_change=lambda: None).pressed)


@cache
def _component() -> Callable[..., Any]:
    import streamlit as st

    made: Callable[..., Any] = st.components.v2.component("quire.escape_key", js=_SCRIPT)
    return made
