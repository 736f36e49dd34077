"""One registered version: its identity, figures and lineage, and what can be done with it. Returns nothing; starts actions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import streamlit as st

from workbench.resident import HostPhase
from workbench.ui import formats, markup, resources, who
from workbench.ui.components import action_state, confirm, sleep_button
from workbench.ui.registry_view import CHAMPION, REGISTRY, VersionRow

if TYPE_CHECKING:
    from workbench.ui.resources import PageServices

MAX_METRICS = 6
ACTIONS = "versions:"


def show(services: PageServices, row: VersionRow, champion: int | None) -> None:
    """Render it; `champion` is the version that the alias names now."""
    with st.container(border=True, key=f"version_{row.ref}"):
        about, buttons = st.columns([3.2, 1.3], vertical_alignment="center")
        with about:
            st.html(as_html(row))
        with buttons, st.container(horizontal=True, horizontal_alignment="right"):
            _load_button(row)
            if row.resident is not None:
                sleep_button.show(row.resident, row.ref, ACTIONS)
            if row.version != champion:
                _promote_button(services, row, champion)


def as_html(row: VersionRow) -> str:
    info = row.info
    state = _state_html(row)
    facts = [
        formats.bytes_of(info.size_bytes) if info.size_bytes else "",
        f"registered {formats.since(str(info.created_at))}" if info.created_at else "",
        *(
            f"{name} <b>{formats.significant(value)}</b>"
            for name, value in list(info.metrics.items())[:MAX_METRICS]
        ),
    ]
    told = "".join(f"<span>{fact}</span>" for fact in facts if fact)
    about = f"<div>{markup.text(info.description)}</div>" if info.description else ""
    return (
        f"<div>{markup.version_name(row.name, row.version, info.ref.digest or '', info.aliases)} {state}</div>{about}"
        f'<div class="q-figures">{told}</div>{lineage_html(info.lineage)}'
    )


def _state_html(row: VersionRow) -> str:
    """Whether it is loaded, and whether an adapter is served over its base or merged."""
    resident = row.resident
    if resident is None:
        return ""
    told = "asleep" if resident.state.phase is HostPhase.SLEEPING else "loaded"
    if row.is_default:
        told += ", the default"
    if resident.parent:
        told += f", an adapter of {resident.parent}"
    kind = "warn" if told.startswith("asleep") else "busy" if row.is_default else "ok"
    merged = (
        f" {markup.chip('idle', f'merged: {resident.merged_because}')}" if resident.merged_because else ""
    )
    return markup.chip(kind, told) + merged


def lineage_html(lineage: Any) -> str:
    """What it was made of, folded; empty without a record."""
    facts = lineage if isinstance(lineage, Mapping) else {}
    listed = "".join(
        f"<dt>{markup.text(name)}</dt><dd class=q-mono>{markup.text(value)}</dd>"
        for name, value in facts.items()
        if value not in (None, "", {}, [])
    )
    if not listed:
        return ""
    return f'<details class="q-doubt"><summary>{markup.term("lineage", "lineage")}</summary><div class="q-panel info"><dl>{listed}</dl></div></details>'


def _load_button(row: VersionRow) -> None:
    host = resources.host()
    if row.resident_id is None:
        if who.button(
            "Load",
            key=f"load_{row.ref}",
            help="Make it resident beside the others, so that it can be chosen above.",
        ):
            action_state.start(
                f"{ACTIONS}load:{row.ref}", f"Load {row.name} v{row.version}", lambda: host.load(row.ref)
            )
            st.rerun()
        return
    resident = row.resident_id
    if who.button("Unload", key=f"unload_{row.ref}", disabled=row.is_default,
                 help="The default version stays." if row.is_default else "Give its memory back; running answers end first."):  # fmt: skip
        action_state.start(
            f"{ACTIONS}unload:{row.ref}", f"Unload {row.name} v{row.version}", lambda: host.unload(resident)
        )
        st.rerun()


def _promote_button(services: PageServices, row: VersionRow, champion: int | None) -> None:
    before = f", which names v{champion} now" if champion else ""
    reason = confirm.show(
        "Promote",
        f"Point **@{CHAMPION}** of `{row.name}` at **v{row.version}**{before}. Engines that follow the alias swap to it; "
        "running answers end on the version they began with. *Roll back* undoes it.",
        f"Promote v{row.version}",
        key=f"promote_{row.ref}",
        reason=True,
    )
    if reason is not None:
        promote(services, row.name, row.version, reason)
        st.rerun()


def promote(services: PageServices, name: str, version: int, reason: str) -> None:
    action_state.start(
        f"{ACTIONS}alias:{name}", f"Promote {name} v{version} to @{CHAMPION}",
        lambda: services.registry().promote(name, version, alias=CHAMPION, reason=reason), forgets=(REGISTRY,),
    )  # fmt: skip


def roll_back(services: PageServices, name: str) -> None:
    action_state.start(
        f"{ACTIONS}alias:{name}", f"Roll back @{CHAMPION} of {name}",
        lambda: services.registry().rollback(name, alias=CHAMPION), forgets=(REGISTRY,),
    )  # fmt: skip
