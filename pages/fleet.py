"""Fleet: which other servers there are, which has room, and where the requests of routed names go."""

from __future__ import annotations

from typing import TYPE_CHECKING

import streamlit as st

from workbench.ui import fleet_view, markup, pace, resources, who
from workbench.ui.components import action_state, endpoint_form, fleet_list, needs, page_errors, top_bar

if TYPE_CHECKING:
    from workbench.ui.fleet_view import Row
    from workbench.ui.resources import PageServices

REFRESH_S = 2.0
FIRST_WAIT_S = 0.15


def show() -> None:
    bar = top_bar.show()
    st.html(markup.title("Fleet", "Which servers are there, which has room, and who gets the next request?"))
    services = needs.services()
    if services is None:
        return
    with st.sidebar:
        st.html(markup.section("Add an endpoint"))
        endpoint_form.show(services)
    action_state.show(fleet_list.ACTIONS)
    _this_app()
    if fleet_view.endpoints(services):
        _live(services, bar)
    else:
        _empty()
        bar.keep_live()
    _routes(services)


def _this_app() -> None:
    """The app's own state as an instance, where it is out of turn."""
    host = resources.host()
    if not host.is_draining:
        return
    with st.container(horizontal=True, vertical_alignment="center"):
        told = "Its API refuses new requests until it is resumed; those that run go on, and these pages work."
        st.html(markup.panel("warn", "This app is drained", told), width="stretch")
        if who.button("Resume this app", key="resume_here", type="primary"):
            who.require()
            host.is_draining = False
            st.rerun()


@st.fragment(run_every=pace.every(REFRESH_S))  # type: ignore[untyped-decorator]
@page_errors.shown()
def _live(services: PageServices, bar: top_bar.Bar) -> None:
    bar.refresh()
    rows = fleet_view.rows(services, FIRST_WAIT_S)
    st.html(fleet_list.tiles(rows))
    st.html(
        markup.section(
            "Endpoints", "their models are endpoint:NAME/MODEL in Playground, Benchmark and Compare"
        )
    )
    fleet_list.show(services, rows)


def _empty() -> None:
    st.html(
        markup.panel(
            "info", "No other servers yet",
            "Any OpenAI-compatible server can be used beside this app's own models: another Quire, vLLM, Ollama, llama.cpp, "
            "LM Studio, OpenAI, Azure, or MLflow's AI Gateway. Add one in the sidebar, or from a terminal:",
        )
    )  # fmt: skip
    st.code("quire endpoints add gpu http://10.0.0.7:8000", language="bash")


def _routes(services: PageServices) -> None:
    routes = services.settings.route_table
    note = "public names whose requests go to whichever endpoint has room"
    st.html(markup.section("Routes", note))
    if not routes:
        st.html('<p class="q-muted">None. Name them where the app is started:</p>')
        st.code('QUIRE_ROUTES="chat=endpoint:one/qwen3,endpoint:two/qwen3"', language="bash")
        return
    states = {row.endpoint.name: row for row in fleet_view.rows(services)}
    table = [
        (markup.text(route.name), markup.text(target), _state(states.get(target.endpoint)))
        for route in routes
        for target in route.targets
    ]
    st.html(markup.html_table(("name", "endpoint", "state"), table, left=3))


def _state(row: Row | None) -> str:
    return markup.chip(row.chip, row.state) if row is not None else markup.chip("bad", "no such endpoint")


show()
