"""The bar on top of every page: version picker, what the version was trained for, engine chip, running jobs.

Chip and job line are live: either the browser keeps them fresh (`keep_live`, or a page's own live view, which has them too),
or a page's fragment fills them again (`Bar.refresh`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import streamlit as st

from workbench.resident import HostPhase
from workbench.ui import glossary, markup, resources, theme, who
from workbench.ui.components import engine_state, job_bar, live
from workbench.ui.components.engine_state import EngineView
from workbench.ui.components.live import Query, Shown

if TYPE_CHECKING:
    from streamlit.delta_generator import DeltaGenerator

    from engine.records import EngineStats
    from workbench.jobs import Job
    from workbench.resident import Resident

CHIP_EVERY_S = 4.0


@dataclass(slots=True)
class Bar:
    """The rendered bar."""

    model_id: str | None
    view: EngineView
    chip: DeltaGenerator
    place: DeltaGenerator  # of what keeps the page live
    choices: dict[str, Resident]  # by what requests call them
    jobs: list[Job] = field(default_factory=list)  # those that the popover shows

    def refresh(self) -> EngineView:
        """Read the engine's state and the jobs again and show them; reruns the page when other jobs run than before.

        Always writes: what a fragment does not write again outside of itself, Streamlit takes away.
        """
        self.view = engine_state.read(self.model_id)
        jobs = job_bar.active()
        self.chip.html(_line(self.view, jobs))
        if [job.id for job in jobs] != [job.id for job in self.jobs]:
            st.rerun()
        return self.view

    def keep_live(self) -> None:
        """Let the browser keep chip and job line fresh; the page runs again when the engine's state or the jobs change."""
        state = shown(self.view, self.jobs).state
        live.show(self.place, Query("chip", self.model_id, theme.current()), state, CHIP_EVERY_S)


def show() -> Bar:
    """Render the bar; the chosen model and the engine's state."""
    choices = {name_of(r): r for r in resources.host().resident() if is_choice(r)}
    picker, middle, status = st.columns([3, 5, 2.4], vertical_alignment="top")
    with picker:
        model_id = _pick(choices)
    chosen = choices.get(model_id or "")
    view = engine_state.read(model_id)
    with middle:
        st.html(about(chosen) + determinism(view.stats))
    jobs = job_bar.active()
    with status:
        slot = st.empty()
        place = st.container()
        job_bar.popover(jobs)
    bar = Bar(model_id, view, slot, place, choices, jobs)
    slot.html(_line(bar.view, jobs))
    return bar


def shown(view: EngineView, jobs: list[Job], *more: object) -> Shown:
    """The bar's live parts. The page runs again when another model or none serves, other jobs run, or `more` changes."""
    serving = view.card.id if view.card else None
    depends = serving, view.state.phase.value, view.dead, view.worker is None, [job.id for job in jobs], more
    return Shown(live.digest(repr(depends)), {"chip": engine_state.chip(view), "jobs": job_bar.line(jobs)})


def _line(view: EngineView, jobs: list[Job]) -> str:
    return f'<div class="q-barline">{who.as_html()}{live.slots(shown(view, jobs), "chip", "jobs")}</div>'


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
    title = resident.card.title if resident.card else name
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


def determinism(stats: EngineStats | None) -> str:
    """What the needle test found on this device, for an engine in deterministic mode; else nothing."""
    if stats is None or stats.is_proven_deterministic is None:
        return ""
    if stats.is_proven_deterministic:
        return markup.chip("ok", f"deterministic, proven on {stats.device}")
    return markup.chip("bad", f"deterministic mode does NOT hold on {stats.device}")
