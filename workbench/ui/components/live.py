"""Live parts of a page: slots that the browser fills again by itself, by asking ``/live/NAME``, without a run of the page.

A page renders its slots and canvases once, with what `Shown` holds then, and one follower; ``live.js`` asks
``workbench.ui.live_route`` for the same view again and again, puts HTML into slots and hands data to canvases. Only when
`Shown.state` changes does the page run again. A run costs about 30 ms of processor time, an answer a small part of that.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from workbench.ui import markup
from workbench.ui.theme import ThemeName

if TYPE_CHECKING:
    from streamlit.delta_generator import DeltaGenerator

_HTML = '<p class="old" hidden><span role="status"></span> <span class="age"></span></p>'
_CSS = """
.old { margin: 0; text-align: right; font: 13px/1.4 var(--st-font, sans-serif);
  color: var(--q-warn); }
"""


@dataclass(frozen=True, slots=True)
class Query:
    """Which view, and how: the path and the parameters of what the browser asks for."""

    name: str
    model: str | None = None
    theme: ThemeName = "light"
    window_s: int = 30

    def parameters(self) -> str:
        model = {} if self.model is None else {"model": self.model}
        return urlencode({**model, "theme": self.theme, "window": self.window_s})


@dataclass(frozen=True, slots=True)
class Shown:
    """What the live parts of a page show at one moment."""

    state: str  # what the rest of the page depends on: the page runs again when it changes
    html: Mapping[str, str]  # by slot
    data: Mapping[str, Any] = field(default_factory=dict)  # by canvas
    at_s: float | None = None  # end of the time that canvases show, monotonic


def digest(text: str) -> str:
    """Sixteen hexadecimal digits that stand for a text."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def slots(shown: Shown, *names: str) -> str:
    """HTML of these slots, filled; empty for those that the view does not have now."""
    return "".join(
        f'<div class="q-live" data-live="{markup.text(name)}" aria-live="off">{shown.html[name]}</div>'
        for name in names
        if name in shown.html
    )


def show(place: DeltaGenerator, query: Query, state: str, every_s: float) -> None:
    """Follow a view from now on: ask for it every `every_s` seconds while the page is visible."""
    with place:
        _component()(
            key="live",
            data={
                "name": query.name,
                "parameters": query.parameters(),
                "state": state,
                "every_ms": round(1000 * every_s),
                "run": time.monotonic_ns(),  # each run has painted anew
            },
            on_changed_change=lambda: None,
        )


@cache
def _component() -> Callable[..., Any]:
    import streamlit as st

    script = Path(__file__).with_suffix(".js").read_text("utf-8")
    made: Callable[..., Any] = st.components.v2.component("quire.live", html=_HTML, css=_CSS, js=script)
    return made
