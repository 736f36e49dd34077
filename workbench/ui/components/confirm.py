"""One confirmation: a button that says what it will do before it does it."""

from __future__ import annotations

from typing import Literal

import streamlit as st

from workbench.ui import who


def show(
    label: str,
    told: str,
    confirm: str,
    *,
    key: str,
    reason: bool = False,
    primary: bool = False,
    disabled: bool = False,
    help: str | None = None,
) -> str | None:
    """A popover with the effect in words and one button, for administrators; the reason that was given (may be empty) when it was confirmed."""
    refused = who.lacks()
    state, count = st.session_state, f"{key}_count"
    kind: Literal["primary", "secondary"] = "primary" if primary else "secondary"
    # a popover closes when it is another one: its key counts the confirmations
    with st.popover(
        label,
        disabled=disabled or refused is not None,
        help=refused or help,
        type=kind,
        key=f"{key}_open_{state.get(count, 0)}",
    ):
        st.markdown(told)
        given = st.text_input("Reason, kept in the history", key=f"{key}_reason") if reason else ""
        if st.button(confirm, key=key, type="primary"):
            state[count] = state.get(count, 0) + 1
            return given or ""
    return None
