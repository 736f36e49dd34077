"""Add an endpoint: a name and an address; the server is asked what it is. A key is named by its variable, never typed here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import streamlit as st

from workbench.backends.discovery import identify
from workbench.backends.endpoint_kinds import KINDS
from workbench.backends.endpoints import Endpoint, Endpoints, endpoint
from workbench.ui import who
from workbench.ui.components import action_state
from workbench.ui.components.fleet_list import ACTIONS
from workbench.ui.fleet_view import FLEET

if TYPE_CHECKING:
    from workbench.ui.resources import PageServices

ASK = "ask it"


def show(services: PageServices) -> None:
    """Render the form; sent, it starts an action."""
    with st.form("endpoint_form", border=False):
        name = st.text_input("Name", key="endpoint_name", placeholder="gpu")
        url = st.text_input("Address", key="endpoint_url", placeholder="http://10.0.0.7:8000")
        kind = st.selectbox(
            "Kind", [ASK, *KINDS], key="endpoint_kind",
            format_func=lambda each: each if each == ASK else KINDS[each].title,
        )  # fmt: skip
        key_env = st.text_input(
            "Variable with its key", key="endpoint_key_env", placeholder="none",
            help="The name of an environment variable of this app, such as OPENAI_API_KEY. The key itself is never stored.",
        )  # fmt: skip
        model = st.text_input("Model", key="endpoint_model", placeholder="any that it lists")
        api_version = st.text_input(
            "api-version", key="endpoint_api_version", placeholder="Azure by deployment only"
        )
        refused = who.lacks()
        if not st.form_submit_button(
            "Add the endpoint", type="primary", help=refused, disabled=refused is not None
        ):
            return
    given = {"key_env": key_env or None, "model": model or None, "api_version": api_version or None}

    def add() -> Endpoint:
        made = (
            identify(name, url, **given)[0] if kind == ASK else endpoint(name, url, kind=str(kind), **given)
        )
        return Endpoints(services.store).add(made)

    action_state.start(
        f"{ACTIONS}add", f"Add {name or 'an endpoint'}", add, forgets=(FLEET, f"{FLEET}_models")
    )
