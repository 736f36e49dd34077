"""What is loaded here: every resident with its state, how its weights and cache are stored, its adapters, and sleep and unload."""

from __future__ import annotations

from typing import TYPE_CHECKING

import streamlit as st

from workbench.resident import HostPhase
from workbench.resident_format import format_of, told
from workbench.ui import formats, markup, resources, who
from workbench.ui.components import action_state, sleep_button
from workbench.ui.components.version_card import ACTIONS

if TYPE_CHECKING:
    from workbench.resident import Resident

_KINDS = {
    HostPhase.READY: "ok",
    HostPhase.SLEEPING: "warn",
    HostPhase.LOADING: "busy",
    HostPhase.FAILED: "bad",
}
_WORDS = {HostPhase.READY: "ready", HostPhase.SLEEPING: "asleep"}


def show() -> None:
    """Render the list; its buttons start actions."""
    everyone = resources.host().resident()
    st.html(markup.section("Loaded here", "requests name them so; the first answers those that name none"))
    for resident in everyone:
        with st.container(key=f"resident_{resident.id}"):
            about, buttons = st.columns([3.2, 1.3], vertical_alignment="center")
            about.html(as_html(resident))
            with buttons, st.container(horizontal=True, horizontal_alignment="right"):
                if resident.parent is None:  # an adapter sleeps with its base
                    sleep_button.show(resident, f"resident_{resident.id}", ACTIONS)
                _unload_button(resident)


def as_html(resident: Resident) -> str:
    """One resident: what requests call it, its state, and what it is made of."""
    phase = resident.state.phase
    state = (
        f"loading {resident.state.fraction:.0%}"
        if phase is HostPhase.LOADING
        else _WORDS.get(phase, phase.value)
    )
    chips = [markup.chip(_KINDS.get(phase, "idle"), state)]
    if resident.is_default:
        chips.append(markup.chip("idle", "the default"))
    if resident.parent:
        chips.append(markup.chip("idle", f"an adapter of {resident.parent}"))
    facts = [
        told(format_of(resident)) if not resident.parent else "",
        formats.bytes_of(resident.memory_bytes) if resident.memory_bytes else "",
        f"adapters: {', '.join(resident.adapters)}" if resident.adapters else "",
        f"merged: {resident.merged_because}" if resident.merged_because else "",
        resident.state.message if phase in (HostPhase.FAILED, HostPhase.LOADING) else "",
    ]
    listed = "".join(f"<span>{markup.text(fact)}</span>" for fact in facts if fact)
    aliases = [alias.partition("@")[2] for alias in resident.aliases]
    name = markup.version_name(resident.id, None, resident.digest, aliases)
    return f'<div>{name} {" ".join(chips)}</div><div class="q-figures">{listed}</div>'


def _unload_button(resident: Resident) -> None:
    host, model_id = resources.host(), resident.id
    reason = "The default stays." if resident.is_default else "Running answers end first."
    if resident.adapters:
        reason = "Unload its adapters first."
    if who.button(
        "Unload", key=f"unload_resident_{model_id}", disabled=resident.is_default or bool(resident.adapters), help=reason
    ):  # fmt: skip
        action_state.start(f"{ACTIONS}unload:{model_id}", f"Unload {model_id}", lambda: host.unload(model_id))
        st.rerun()
