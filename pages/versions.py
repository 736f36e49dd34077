"""Versions: the registry, what is loaded, and the alias that decides what is served."""

from __future__ import annotations

from typing import TYPE_CHECKING

import streamlit as st

from workbench.ui import formats, markup, pace, registry_view, resources
from workbench.ui.components import (
    action_state,
    alias_history,
    confirm,
    followed_alias,
    model_plan,
    needs,
    own_model,
    page_errors,
    recipes,
    resident_list,
    top_bar,
    version_card,
)
from workbench.ui.markup import Tile, term
from workbench.ui.registry_view import CHAMPION

if TYPE_CHECKING:
    from collections.abc import Mapping

    from workbench.ui.resources import PageServices
    from workbench.versions.registry import VersionInfo

REFRESH_S = 3.0
MAX_SHOWN = 12


def show() -> None:
    bar = top_bar.show()
    st.html(
        markup.title(
            "Versions", "Which version does each name serve, what was it made of, and can we go back?"
        )
    )
    top = st.container()
    action_state.show(version_card.ACTIONS)
    resident_list.show()
    services = needs.services()
    if services is not None:
        _registry(services)
    with top:
        _follow(bar)  # last: it compares with what was drawn


def _registry(services: PageServices) -> None:
    st.session_state.versions_seen = None
    found = needs.value(registry_view.all_versions(services), "The registry")
    if found is None:
        return
    st.session_state.versions_seen = _seen(found)
    if found:
        _registered(services, found)
    else:
        told = "Register a model below; it is kept by reference, not copied."
        st.html(markup.panel("info", "Nothing is registered yet", told))
    own_model.show(services)
    model_plan.show()


def _seen(found: Mapping[str, VersionInfo] | None) -> object:
    """What the page shows of registry and host: when it changes, the page is drawn again."""
    host = resources.host()
    serving = [(one.ref, one.registry_version, one.serving_version) for one in host.followed()]
    residents = [(r.id, r.state.phase) for r in host.resident()]
    return registry_view.signature(found or {}), serving, residents


def _registered(services: PageServices, every: Mapping[str, VersionInfo]) -> None:
    names = sorted({info.ref.name for info in every.values()})
    name = st.segmented_control(
        "Name", names, default=names[0], key="name", bind="query-params", required=True
    )
    found = registry_view.versions_of(every, name)
    champion = registry_view.alias_of(found)
    rows = registry_view.rows(found)
    st.html(markup.tiles(_tiles(found, champion, sum(row.resident_id is not None for row in rows))))
    _alias_row(services, name, champion)
    everything = len(rows) <= MAX_SHOWN or st.toggle(
        f"All {len(rows)} versions", key="all", bind="query-params"
    )
    for row in rows if everything else rows[:MAX_SHOWN]:
        version_card.show(services, row, int(champion.ref.version or 0) if champion else None)
    alias_history.show(services, name)


def _tiles(found: list[VersionInfo], champion: VersionInfo | None, num_loaded: int) -> list[Tile]:
    digest = champion.ref.digest if champion else ""
    return [
        Tile("Versions", f"{len(found):,}", "registered under this name"),
        Tile(term("alias", f"@{CHAMPION}"), f"v{champion.ref.version}" if champion else formats.UNKNOWN, "what is served under the name"),
        Tile(term("digest", "Its digest"), (digest or formats.UNKNOWN)[:8], "its identity"),
        Tile("Loaded here", f"{num_loaded:,}", f"of {len(resources.host().resident()):,} resident models"),
    ]  # fmt: skip


def _alias_row(services: PageServices, name: str, champion: VersionInfo | None) -> None:
    before = registry_view.previous(services, name).value or None
    with st.container(horizontal=True, vertical_alignment="center"):
        told = (
            f"Point **@{CHAMPION}** of `{name}` back at **v{before}**, which it named before."
            if before
            else ""
        )
        asked = confirm.show(
            "Roll back", told, f"Roll back to v{before}", key=f"rollback_{name}", disabled=before is None,
            help=None if before else "The alias has named one version only.",
        )  # fmt: skip
        if asked is not None:
            version_card.roll_back(services, name)
            st.rerun()
        version = champion.ref.version if champion else 1
        recipes.show(
            "\n".join([
                "quire versions list",
                recipes.command("quire versions promote", name, version),
                recipes.command("quire versions rollback", name),
            ]),
            "from workbench import settings\nfrom workbench.versions.registry import Registry\n\n"
            f"registry = Registry(settings.load())\nregistry.promote({name!r}, {version!r})\nregistry.rollback({name!r})",
            key="versions",
        )  # fmt: skip
        st.link_button("This name in MLflow", f"/mlflow/#/models/{name}")


@st.fragment(run_every=pace.every(REFRESH_S))  # type: ignore[untyped-decorator]
@page_errors.shown()
def _follow(bar: top_bar.Bar) -> None:
    """The followed aliases, kept fresh; draws the page again when registry or residents have changed."""
    bar.refresh()
    st.html(followed_alias.as_html() or "<span hidden></span>")
    services, seen = resources.services(), st.session_state.get("versions_seen")
    found = registry_view.all_versions(services).value if services else None
    if found is not None and seen is not None and seen != _seen(found):
        st.rerun()


show()
