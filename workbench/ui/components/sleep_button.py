"""Sleep and wake of a resident's engine, as one button that starts an action."""

from __future__ import annotations

from typing import TYPE_CHECKING

import streamlit as st

from workbench.resident import HostPhase
from workbench.ui import resources, who
from workbench.ui.components import action_state

if TYPE_CHECKING:
    from workbench.resident import Resident

ACTIONS = "sleep:"
_SLEEP = "Give its device memory to others; running answers end first. Its adapters sleep with it, requests are refused meanwhile."
_NEVER = "An encoder does not sleep: unload it, and load it again later."
_WAKE = "Take requests again, with its adapters."


def show(resident: Resident, key: str, prefix: str = ACTIONS) -> None:
    """Render it for a resident that is loaded; nothing for others. `prefix`: of the action that a click starts."""
    if not resident.state.loaded:
        return
    host, engine = resources.host(), resident.parent or resident.id  # an adapter sleeps with its base
    is_asleep = resident.state.phase is HostPhase.SLEEPING
    label, act = ("Wake", host.wake) if is_asleep else ("Sleep", host.sleep)
    can_sleep = resident.task == "generate"
    told = (_WAKE if is_asleep else _SLEEP) if can_sleep else _NEVER
    if who.button(label, key=f"sleep_{key}", help=told, disabled=not can_sleep):
        action_state.start(f"{prefix}{label}:{engine}", f"{label} {engine}", lambda: act(engine))
        st.rerun()
