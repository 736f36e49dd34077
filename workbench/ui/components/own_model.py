"""Load your own model: a folder or hub id is checked, registered by reference, and made resident."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import streamlit as st

from workbench.ui import markup, resources
from workbench.ui.components import action_state
from workbench.ui.components.version_card import ACTIONS
from workbench.ui.registry_view import REGISTRY

if TYPE_CHECKING:
    from workbench.ui.resources import PageServices


def show(services: PageServices) -> None:
    """Render the form; starts an action when it was sent."""
    st.html(markup.section("Load your own model", "registered by reference: its weights stay where they are"))
    with st.form("own_model", border=True):
        left, right, button = st.columns([3, 2, 1], vertical_alignment="bottom")
        path = left.text_input(
            "Folder or hub id", key="own_path", bind="query-params", placeholder="/models/my-model or org/name",
            help="A folder with config.json and *.safetensors, a *.gguf file, or a hub id that can be downloaded here.",
        )  # fmt: skip
        name = right.text_input(
            "Name in the registry", key="own_name", bind="query-params", placeholder="its folder's name"
        )
        sent = button.form_submit_button("Load", type="primary", width="stretch", key="own_load")
    if not sent:
        return
    given = (path or "").strip()
    if not given:
        st.html(markup.panel("warn", "No model was named", "Write a folder or a hub id."))
        return
    chosen = registered_name(given, name or "")
    action_state.start(
        f"{ACTIONS}own",
        f"Load {given} as {chosen}",
        lambda: load(services, given, chosen),
        forgets=(REGISTRY,),
    )
    st.rerun()


def registered_name(path: str, name: str) -> str:
    """`name`, or the last part of the path in the registry's letters."""
    return name.strip() or re.sub(r"[^A-Za-z0-9._-]+", "-", Path(path).name).strip("-.") or "model"


def load(services: PageServices, path: str, name: str) -> str:
    """Check it, make it resident, and register it only then; the resident's id. Raises the typed error of what refuses.

    A hub id is downloaded into the hub's own cache first.
    """
    from engine.model_folder import find_model
    from workbench.model_card import check_model

    check_model(path)
    folder = find_model(path)
    resident = resources.host().load(str(folder))
    services.registry().register(name, base=folder, description=f"Loaded from {path}")
    return str(resident.id)
