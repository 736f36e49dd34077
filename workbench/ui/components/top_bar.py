"""The bar on top of every page: version picker, what the version was trained for, engine chip, running jobs.

Chip and job line are a slot that a page's live fragment fills again (`Bar.refresh`), so that no page runs a second fragment
for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import streamlit as st

from workbench.resident import HostPhase
from workbench.ui import glossary, markup, resources
from workbench.ui.components import engine_state, job_bar
from workbench.ui.components.engine_state import EngineView

if TYPE_CHECKING:
    from streamlit.delta_generator import DeltaGenerator

    from workbench.resident import Resident


@dataclass(slots=True)
class Bar:
    """The rendered bar."""

    model_id: str | None
    view: EngineView
    chip: DeltaGenerator
    job_ids: tuple[str, ...] = ()  # those that the popover shows

    def refresh(self) -> EngineView:
        """Read the engine's state and the jobs again and show them; reruns the page when other jobs run than before.

        Always writes: what a fragment does not write again outside of itself, Streamlit takes away.
        """
        self.view = engine_state.read(self.model_id)
        jobs = job_bar.active()
        self.chip.html(f'<div class="q-barline">{engine_state.chip(self.view)}{job_bar.line(jobs)}</div>')
        if tuple(job.id for job in jobs) != self.job_ids:
            st.rerun()
        return self.view


def show() -> Bar:
    """Render the bar; the chosen model and the engine's state."""
    choices = {name_of(r): r for r in resources.host().resident() if is_choice(r)}
    picker, middle, status = st.columns([3, 5, 2.4], vertical_alignment="top")
    with picker:
        model_id = _pick(choices)
    chosen = choices.get(model_id or "")
    with middle:
        st.html(about(chosen))
    jobs = job_bar.active()
    with status:
        slot = st.empty()
        job_bar.popover(jobs)
    bar = Bar(model_id, engine_state.read(model_id), slot, tuple(job.id for job in jobs))
    slot.html(f'<div class="q-barline">{engine_state.chip(bar.view)}{job_bar.line(jobs)}</div>')
    return bar


def is_choice(resident: Resident) -> bool:
    """Whether people may choose it: its files were read, and no job made it for itself."""
    return resident.card is not None and (resident.is_default or not resident.deterministic)


def name_of(resident: Resident) -> str:
    """What requests call it: a followed alias stays chosen when it moves to another version."""
    return resident.aliases[0] if resident.followed and resident.aliases else resident.id


def _pick(choices: dict[str, Resident]) -> str | None:
    if not choices:
        st.selectbox("Version", ["no model yet"], disabled=True, key="model_none")
        return None
    chosen: str | None = st.selectbox(
        "Version",
        list(choices),
        format_func=lambda name: option_label(name, choices[name]),
        key="model",
        bind="query-params",
        help=f"Its identity is the digest. {glossary.tip('digest')}",
    )
    return chosen


def option_label(name: str, resident: Resident) -> str:
    """What stays the same as long as the choice does, since the address holds it: a followed alias by its name, a version with
    the first eight of its digest; the title says "demo" where it is one."""
    if name in resident.aliases:
        return name.replace("@", " @")
    title = (
        f"{resident.name} v{resident.version}"
        if resident.name
        else resident.card.title
        if resident.card
        else name
    )
    return f"{title} · {resident.digest[:8]}" if resident.digest else title


def about(chosen: Resident | None) -> str:
    """Which version it is, how far its load is, and what it was trained for."""
    card = chosen.card if chosen else None
    if chosen is None or card is None:
        return '<div class="q-trained">The picker fills when the model is known.</div>'
    badge = '<span class="q-badge">demo</span>' if card.is_demo else ""
    told = f"Trained for {card.trained_for}" if card.trained_for else card.description
    aliases = [alias.partition("@")[2] for alias in chosen.aliases]
    named = markup.version_name(chosen.name, chosen.version, chosen.digest, aliases) if chosen.name else ""
    is_loading = chosen.state.phase is HostPhase.LOADING  # the engine chip tells the other states
    state = markup.chip("warn", f"loading {chosen.state.fraction:.0%}") if is_loading else ""
    return f'<div class="q-trained">{named} {state} {badge}{markup.text(told)}</div>'
