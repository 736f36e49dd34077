"""Every endpoint with its state, what it serves and its room, and what can be done with it: drain, resume, forget."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import streamlit as st

from workbench.backends.endpoint_kinds import QUIRE
from workbench.backends.endpoints import Endpoint, Endpoints
from workbench.fleet.status import DRAINING, READY, Status, drain
from workbench.ui import formats, markup, who
from workbench.ui.components import action_state, confirm
from workbench.ui.fleet_view import DOWN, FLEET, Row

if TYPE_CHECKING:
    from workbench.ui.resources import PageServices

ACTIONS = "fleet:"
MAX_MODELS = 4  # named; of the others the number


def tiles(rows: Sequence[Row]) -> str:
    """The first row: how many there are, and the room of all that tell theirs."""
    known = [row.now for row in rows if row.now is not None and row.state == READY]
    free = [status.free_slots for status in known if status.free_slots is not None]
    slots = [status.max_num_seqs for status in known if status.max_num_seqs is not None]
    tokens = [status.waiting_tokens for status in known if status.waiting_tokens is not None]
    running = [status.running for status in known if status.running is not None]
    down = sum(row.state == DOWN for row in rows)
    shown = [
        markup.Tile("Ready", f"{len(known)} of {len(rows)}", f"{down} down" if down else ""),
        markup.Tile(
            markup.term("free slots", "Free slots"), _sum(free, low=0), f"of {sum(slots)}" if slots else ""
        ),
        markup.Tile("Running", _sum(running), "requests"),
        markup.Tile(
            markup.term("queued tokens", "Queued tokens"),
            _sum(tokens),
            f"told by {len(tokens)} of {len(rows)}",
        ),
    ]
    return markup.tiles(shown)


def show(services: PageServices, rows: Sequence[Row]) -> None:
    """Render the endpoints, each with its buttons, which start actions."""
    for row in rows:
        with st.container(key=f"endpoint_{row.endpoint.name}"):
            about, buttons = st.columns([3.4, 1.3], vertical_alignment="center")
            about.html(as_html(row))
            with buttons, st.container(horizontal=True, horizontal_alignment="right"):
                _drain_button(row)
                _forget_button(services, row.endpoint)


def as_html(row: Row) -> str:
    """One endpoint: name, kind, state with its age, what it serves, and its room in figures."""
    endpoint, reading, status = row.endpoint, row.reading, row.now
    age = "" if reading.age_s is None else f"{formats.duration(reading.age_s)} ago"
    chips = [markup.chip(row.chip, row.state), markup.chip("idle", endpoint.abilities.title)]
    told = [_url(endpoint), f"version {status.version}" if status is not None and status.version else ""]
    if row.state == DOWN:
        told.append(f"last answered {age}" if age else "has not answered yet")
    elif age:
        told.append(f"read {age}, in {formats.milliseconds(status.latency_ms if status else None)}")
    if status is not None:
        told.append(_models(status))
    name = f'<span class="q-version"><b>{markup.text(endpoint.name)}</b></span>'
    facts = "".join(f"<span>{markup.text(each)}</span>" for each in told if each)
    figures = "".join(f"<span>{each}</span>" for each in _room(status)) if status is not None else ""
    note = reading.error if reading.error is not None else status.message if status is not None else ""
    said = f'<p class="q-age warn">{markup.text(note)}</p>' if note else ""
    shown = f'<div class="q-figures">{figures}</div>' if figures else ""
    return f'<div>{name} {" ".join(chips)}</div>{shown}<div class="q-figures q-muted">{facts}</div>{said}'


def _room(status: Status) -> list[str]:
    """Slots, queue and blocks as HTML; "–" for what the server does not tell."""

    def figure(value: int | None, what: str, of: int | None = None) -> str:
        return f"<b>{formats.count(value)}</b>{f' of {of:,}' if of is not None else ''} {what}"

    room = [
        figure(status.free_slots, "slots free", status.max_num_seqs),
        figure(status.running, "running"),
        figure(status.waiting, "waiting"),
        figure(status.waiting_tokens, "tokens queued"),
    ]
    if status.kv_usage is not None:
        return [*room, f"<b>{1 - status.kv_usage:.0%}</b> of the KV cache free"]
    return [*room, figure(status.free_blocks, "KV blocks free", status.num_blocks)]


def _models(status: Status) -> str:
    names = [*status.models[:MAX_MODELS]]
    more = len(status.models) - len(names)
    return f"serves {', '.join(names)}{f' and {more} more' if more else ''}" if names else ""


def _url(endpoint: Endpoint) -> str:
    return endpoint.url + (f", key in {endpoint.key_env}" if endpoint.key_env else "")


def _drain_button(row: Row) -> None:
    endpoint = row.endpoint
    if endpoint.kind != QUIRE:
        return
    resume = row.state == DRAINING
    label = "Resume" if resume else "Drain"
    told = (
        "Take requests again."
        if resume
        else "It takes no more requests; those that run go on. Resume undoes it."
    )
    if who.button(label, key=f"drain_{endpoint.name}", help=told, disabled=row.state in (DOWN, "asking")):
        act = partial(drain, endpoint, resume=resume)
        action_state.start(f"{ACTIONS}{endpoint.name}", f"{label} {endpoint.name}", act, forgets=(FLEET,))
        st.rerun()


def _forget_button(services: PageServices, endpoint: Endpoint) -> None:
    name = endpoint.name
    told = f"**{name}** is forgotten here. The server itself is left alone; add it again at any time."
    if confirm.show("Forget", told, f"Forget {name}", key=f"forget_{name}") is not None:
        remove = partial(Endpoints(services.store).remove, name)
        action_state.start(f"{ACTIONS}{name}", f"Forget {name}", remove, forgets=(FLEET,))
        st.rerun()


def _sum(values: Sequence[int], low: int | None = None) -> str:
    kept = values if low is None else [max(low, each) for each in values]
    return f"{sum(kept):,}" if kept else "–"
