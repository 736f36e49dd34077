"""A link to a run in MLflow's own pages, under this origin (or at somebody else's server where one is configured)."""

from __future__ import annotations

import streamlit as st

from workbench.ui import resources
from workbench.ui.components import needs
from workbench.ui.resources import PageServices


def show(services: PageServices, run_id: object, label: str = "This run in MLflow") -> None:
    """The link as soon as MLflow has answered once; nothing without a run."""
    if not run_id:
        return
    reading = resources.readings().get(
        ("run link", run_id), lambda: _link(services, str(run_id)), ttl_s=3600.0
    )
    if reading.value:
        st.link_button(label, reading.value)
    elif reading.error is None:
        needs.again(1.0)


def _link(services: PageServices, run_id: str) -> str:
    from workbench import tracking

    return tracking.link(services.settings, run_id)
