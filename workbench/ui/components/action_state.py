"""What clicks started and has not been told yet: running with its seconds, done, or failed with value, limit and remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import streamlit as st

from workbench.access.principal import Right
from workbench.ui import formats, markup, resources, who
from workbench.ui.actions import Action
from workbench.ui.components import page_errors

REFRESH_S = 0.7
TOLD_S = 20.0


def start(
    key: str,
    label: str,
    function: Callable[[], Any],
    *,
    forgets: tuple[str, ...] = (),
    right: Right = Right.ADMIN,
) -> Action:
    """Run `function` off the script thread, for those alone who have the right; what was read about `forgets` is read anew afterwards."""
    readings = resources.readings()
    return resources.actions().start(
        key, label, who.guarded(function, right), after=lambda: readings.forget(*forgets)
    )


def show(prefix: str) -> None:
    """The actions whose key begins so; the page reruns when one of them ends."""
    shown = resources.actions().lately(prefix, TOLD_S)
    for action in shown:
        if action.error is not None:
            with st.container(horizontal=True, vertical_alignment="center"):
                st.html(markup.error_panel(f"{action.label}: it did not work", action.error), width="stretch")
                st.button(
                    "Dismiss",
                    key=f"dismiss_{action.key}",
                    on_click=resources.actions().dismiss,
                    args=(action.key,),
                )
    done = [action for action in shown if not action.running and action.error is None]
    if done:
        told = "".join(f"<div>✓ {markup.text(action.label)}: done</div>" for action in done)
        st.html(f'<div class="ok-text" role="status">{told}</div>')
    if any(action.running for action in shown):
        _watch(prefix)


@st.fragment(run_every=REFRESH_S)  # type: ignore[untyped-decorator]
@page_errors.shown()
def _watch(prefix: str) -> None:
    running = [action for action in resources.actions().lately(prefix, TOLD_S) if action.running]
    if not running:
        st.rerun()
    for action in running:
        told = f"{action.label} … {formats.duration(action.seconds)}"
        st.html(f'<p class="q-muted" role="status">{markup.text(told)}</p>')
