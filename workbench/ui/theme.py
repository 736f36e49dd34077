"""Every colour of the interface, from one set of tokens: light and dark, for Streamlit, CSS, canvases and Plotly.

Streamlit reads its theme from ``.streamlit/config.toml``; ``python -m workbench.ui.theme`` prints that file from these
tokens, and a test holds the two together. A thing keeps its colour on every page: `colour_of` maps its id to one of
eight colours by a stable hash.

Does not decide what a colour is used for on a page, but for the meanings that INTERFACE fixes: red is broken or
refused, amber not proven, green proven, grey cached.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any, Literal

ThemeName = Literal["light", "dark"]


@dataclass(frozen=True, slots=True)
class Tokens:
    """The colours of one theme, as ``#RRGGBB``."""

    background: str
    surface: str  # cards, sidebar, code
    border: str
    text: str
    muted: str  # secondary text; at least 4.5:1 on background
    accent: str  # buttons, links
    ok: str
    warn: str
    bad: str
    cached: str  # KV blocks that are free but matchable
    palette: tuple[
        str, ...
    ]  # eight that stay apart under the three colour-vision deficiencies, and from `cached`


LIGHT = Tokens(
    background="#FFFFFF",
    surface="#F5F7F8",
    border="#DDE2E6",
    text="#1B2127",
    muted="#59636E",
    accent="#0B6E7F",
    ok="#1A7F45",
    warn="#9A6700",
    bad="#C0292B",
    cached="#B4B9C0",
    palette=("#237163", "#E7A331", "#5FB5F2", "#940EB2", "#887130", "#2B16EC", "#132547", "#49150D"),
)
DARK = Tokens(
    background="#14171C",
    surface="#1C2128",
    border="#323943",
    text="#E6E9ED",
    muted="#9AA4B0",
    accent="#2290A8",
    ok="#4CC38A",
    warn="#D9A23B",
    bad="#F2706E",
    cached="#5B616B",
    palette=("#3EEFAE", "#C39913", "#67A3C7", "#9247BB", "#F1F37D", "#4F4BF0", "#C2E5F4", "#A64D30"),
)
_THEMES: dict[ThemeName, Tokens] = {"light": LIGHT, "dark": DARK}

SERIES = {  # fixed roles, as places in the palette
    "decode": 2,
    "prefill": 1,
    "forward": 0,
    "prepare": 1,
    "schedule": 3,
    "sample": 2,
    "running": 0,
    "waiting": 1,
    "used": 2,
}


def tokens(name: ThemeName) -> Tokens:
    return _THEMES[name]


def current() -> ThemeName:
    """The theme that the reader's browser shows now; light until it has said so."""
    import streamlit as st

    return "dark" if st.context.theme.type == "dark" else "light"


def colour_index(identity: str) -> int:
    """A place in the palette, the same for an id in every process and on every page."""
    return hashlib.blake2b(identity.encode(), digest_size=2).digest()[0] % len(LIGHT.palette)


def colour_of(identity: str, name: ThemeName) -> str:
    return tokens(name).palette[colour_index(identity)]


def series_colour(role: str, name: ThemeName) -> str:
    return tokens(name).palette[SERIES[role]]


def plotly_template(name: ThemeName) -> dict[str, Any]:
    """The one Plotly template: transparent paper, our axes and colours. A plain dict, since validation costs 10 ms."""
    t = tokens(name)
    axis = {
        "gridcolor": t.border,
        "linecolor": t.border,
        "zerolinecolor": t.border,
        "tickcolor": t.border,
        "ticks": "outside",
    }
    return {
        "layout": {
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "colorway": list(t.palette),
            "font": {"color": t.text, "size": 12, "family": "Source Sans, sans-serif"},
            "xaxis": axis,
            "yaxis": axis,
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "traceorder": "normal"},
            "margin": {"l": 56, "r": 16, "t": 36, "b": 44},
            "hoverlabel": {"bgcolor": t.surface, "bordercolor": t.border, "font": {"color": t.text}},
        }
    }


def css_variables(name: ThemeName) -> dict[str, str]:
    """``--q-text`` and so on, for the page's own HTML."""
    t = asdict(tokens(name))
    named = {f"--q-{key}": value for key, value in t.items() if isinstance(value, str)}
    return named | {f"--q-c{i}": colour for i, colour in enumerate(tokens(name).palette)}


def config_toml() -> str:
    """The text of ``.streamlit/config.toml``."""
    lines = [
        "# Written by `python -m workbench.ui.theme`; a test compares. Why each line is there:",
        "[server]",
        "# a hot reload would import a second engine",
        'fileWatcherType = "none"',
        "headless = true",
        "",
        "[runner]",
        "# a full collection after every script run holds the GIL for 50 ms and more beside a resident model",
        "postScriptGC = false",
        "",
        "[browser]",
        "gatherUsageStats = false",
        "",
        "[client]",
        "# errors are shown by the pages, in words; a traceback goes to the log",
        'showErrorDetails = "none"',
        "showErrorLinks = false",
        'toolbarMode = "minimal"',
        "",
        "[theme]",
        'baseRadius = "8px"',
    ]
    for name, t in _THEMES.items():
        lines += [
            "",
            f"[theme.{name}]",
            *_theme_section(t),
            "",
            f"[theme.{name}.sidebar]",
            *_sidebar_section(t),
        ]
    return "\n".join(lines) + "\n"


def _theme_section(t: Tokens) -> list[str]:
    values = {
        "primaryColor": t.accent,
        "backgroundColor": t.background,
        "secondaryBackgroundColor": t.surface,
        "textColor": t.text,
        "linkColor": t.accent,
        "borderColor": t.border,
        "codeBackgroundColor": t.surface,
        "redColor": t.bad,
        "orangeColor": t.warn,
        "greenColor": t.ok,
        "grayColor": t.muted,
    }
    return [f'{key} = "{value}"' for key, value in values.items()]


def _sidebar_section(t: Tokens) -> list[str]:
    return [f'backgroundColor = "{t.surface}"', f'secondaryBackgroundColor = "{t.background}"']


if __name__ == "__main__":
    print(config_toml(), end="")
