"""Load your own model: a folder, hub id or adapter is checked, made resident, and registered by reference; a version is made resident."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import streamlit as st

from workbench.errors import SettingsError
from workbench.load_options import PLAIN, LoadOptions
from workbench.model_source import alias_of, version_of
from workbench.ui import markup, resources, who
from workbench.ui.components import action_state, load_options_form
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
            "Folder, hub id or version", key="own_path", bind="query-params", placeholder="/models/my-model, org/name or NAME@alias",
            help="A folder with config.json and *.safetensors (AWQ, GPTQ, compressed-tensors and fp8 too), a *.gguf file, a hub id "
            "that can be downloaded here, the folder of a PEFT adapter of a model that is loaded, or a registered version.",
        )  # fmt: skip
        name = right.text_input(
            "Name in the registry", key="own_name", bind="query-params", placeholder="its folder's name"
        )
        sent = button.form_submit_button(
            "Load",
            type="primary",
            width="stretch",
            key="own_load",
            disabled=who.lacks() is not None,
            help=who.lacks(),
        )
        written = load_options_form.show()
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
        lambda: load(services, given, chosen, load_options_form.read(written)),
        forgets=(REGISTRY,),
    )
    st.rerun()


def registered_name(path: str, name: str) -> str:
    """`name`, or the last part of the path in the registry's letters."""
    return name.strip() or re.sub(r"[^A-Za-z0-9._-]+", "-", Path(path).name).strip("-.") or "model"


def load(services: PageServices, path: str, name: str, options: LoadOptions = PLAIN) -> str:
    """Check it, make it resident, and register it only then; the resident's id. Raises the typed error of what refuses.

    A hub id is downloaded into the hub's own cache first.
    """
    from engine.model_folder import find_model
    from workbench.model_card import check_model
    from workbench.versions.adapter import is_adapter

    host = resources.host()
    if not Path(path).expanduser().exists() and (version_of(path) or alias_of(path)):
        return str(host.load(path, options=options).id)
    if is_adapter(Path(path).expanduser()):
        return _load_adapter(services, Path(path).expanduser(), name, options)
    check_model(path)
    folder = find_model(path)
    resident = host.load(str(folder), options=options)
    services.registry().register(name, base=folder, description=f"Loaded from {path}")
    return str(resident.id)


def _load_adapter(services: PageServices, folder: Path, name: str, options: LoadOptions) -> str:
    """Over the engine of its base, which is loaded."""
    if options != PLAIN:
        raise SettingsError(
            "an adapter is served by the engine of its base and has no options of its own", value=options.label, limit="none",
            param="options", remedy="Load its base with these options, then the adapter without.",
        )  # fmt: skip
    host = resources.host()
    resident = host.load_adapter(name, str(folder))
    base = host.find(resident.parent).card
    assert base is not None, "an adapter's base is loaded"
    services.registry().register(name, base=base.path, adapter=folder, description=f"Loaded from {folder}")
    return str(resident.id)
