"""One reading of the host and its worker, and how a page shows it when there is no engine to show.

`read` never waits and never raises; a page asks once per run and passes the view on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import streamlit as st

from engine.records import EngineStats, Health, HealthState
from workbench.errors import WorkbenchError
from workbench.resident import HostPhase, HostState
from workbench.ui import markup, resources
from workbench.ui.components import action_state, sleep_button

if TYPE_CHECKING:
    from engine.worker import EngineWorker
    from workbench.model_card import ModelCard
    from workbench.resident import Resident


@dataclass(frozen=True, slots=True)
class EngineView:
    """What the pages know at one moment. `worker`, `stats` and `health` are None until the model is ready."""

    state: HostState
    card: ModelCard | None
    worker: EngineWorker | None
    stats: EngineStats | None
    health: Health | None

    @property
    def loading(self) -> bool:
        return self.state.phase in (HostPhase.IDLE, HostPhase.LOADING)

    @property
    def dead(self) -> bool:
        return self.health is not None and self.health.state is HealthState.DEAD


def read(model_id: str | None = None) -> EngineView:
    """The view of a resident model, by id or by an alias that leads to it; of the default one for another name."""
    host = resources.host()
    resident = resident_of(host.resident(), model_id)
    state = resident.state if resident else host.state()
    card = resident.card if resident else None
    try:
        worker = host.worker(resident.id if resident else None)
    except WorkbenchError:  # not ready, or gone: `state` tells
        return EngineView(state, card, None, None, None)
    return EngineView(state, card, worker, worker.stats(), worker.health())


def resident_of(residents: Sequence[Resident], model_id: str | None) -> Resident | None:
    """The resident of that id or alias; the default one (which comes first) for another name."""
    named = (r for r in residents if r.id == model_id or model_id in r.aliases)
    return next(named, residents[0] if residents else None)


def chip(view: EngineView) -> str:
    """The engine chip's HTML: what the engine does now, from its own records."""
    kind, label = _chip(view)
    return f'<span class="q-chip {kind}" role="status">{markup.text(label)}</span>'


def _chip(view: EngineView) -> tuple[str, str]:
    if view.stats is None or view.health is None:
        if view.loading:
            return "warn", f"loading {view.state.fraction:.0%}"
        if view.state.phase is HostPhase.SLEEPING:
            return "warn", "asleep"
        return "bad", "engine stopped" if view.state.phase is HostPhase.CLOSED else "engine failed"
    if view.health.state is HealthState.DEAD:
        return "bad", "engine stopped"
    if view.health.state is HealthState.STALLED:
        return "warn", "stalled"
    if view.health.state is HealthState.STARTING:
        return "warn", "starting"
    if not view.stats.num_running and not view.stats.num_waiting:
        return "ok", "healthy, idle"
    queue = f", {view.stats.num_waiting:,} queued" if view.stats.num_waiting else ""
    return "busy", f"busy, {view.stats.num_running:,} of {view.stats.max_num_seqs:,} slots{queue}"


def show(view: EngineView) -> EngineWorker | None:
    """The worker to go on with; otherwise a notice was rendered and None is returned."""
    if view.worker is not None and not view.dead:
        return view.worker
    if view.loading:
        _show_loading(view)
    elif view.state.phase is HostPhase.SLEEPING:
        _show_asleep(view)
    elif view.dead and view.health is not None:
        reason = view.health.message or "It takes no more requests."
        st.html(markup.panel("bad", "The engine has stopped", reason, _AFTER_DEATH))
    else:
        _show_failed(view.state)
    return None


_AFTER_DEATH = (
    ("what to do", "Under `quire up` the app restarts by itself within seconds; otherwise start it again."),
    ("id in the log", "engine_dead"),
)


def _show_loading(view: EngineView) -> None:
    name = view.card.title if view.card else "the model"
    st.html(markup.panel("info", f"Loading {name}", "This page goes on by itself when the model is ready."))
    st.progress(view.state.fraction, text=view.state.message or "Starting")


def _show_asleep(view: EngineView) -> None:
    name = view.card.title if view.card else "The model"
    told = f"{view.state.message}. Its device memory is free for others; requests to it are refused until somebody wakes it."
    st.html(markup.panel("info", f"{name} sleeps", told))
    action_state.show(sleep_button.ACTIONS)
    if view.card is not None:
        sleep_button.show(resources.host().find(view.card.id), "waiting")


def _show_failed(state: HostState) -> None:
    error: Any = state.error
    if error is None:
        restart = (
            ("what to do", "Start the app again with `quire up`."),
            ("id in the log", state.phase.value),
        )
        st.html(markup.panel("bad", "There is no engine", state.message, restart))
        return
    facts = tuple(
        (name, value)
        for name, value in (
            ("value", error.value),
            ("limit", error.limit),
            ("what to do", error.remedy or "Run `quire doctor`, then start again."),
            ("id in the log", error.code),
        )
        if value not in (None, "")
    )
    st.html(markup.panel("bad", "The engine is not running", error.message, facts))
