"""Escaped HTML for the pages' own parts. Everything that did not come from this package goes through `text`."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from workbench.ui import theme
from workbench.ui.glossary import TERMS
from workbench.ui.theme import ThemeName


def text(value: object) -> str:
    """`value` as HTML text or attribute value."""
    return html.escape(str(value), quote=True)


def term(name: str, label: str | None = None) -> str:
    """A glossary term that explains itself on hover."""
    return f'<abbr class="q-term" title="{text(TERMS[name])}">{text(label or name)}</abbr>'


def title(heading: str, question: str) -> str:
    return f'<div class="q-head"><h1>{text(heading)}</h1><p>{text(question)}</p></div>'


def section(heading: str, note: str = "") -> str:
    small = f"<small>{text(note)}</small>" if note else ""
    return f'<h2 class="q-section">{text(heading)}{small}</h2>'


@dataclass(frozen=True, slots=True)
class Tile:
    """One figure of a page's first row. `label` is HTML (it may hold a `term`), the rest is text."""

    label: str
    value: str
    note: str = ""


def tiles(items: Iterable[Tile]) -> str:
    cells = (
        f"<div><dt>{tile.label}</dt><dd>{text(tile.value)}<small>{text(tile.note) or '&nbsp;'}</small></dd></div>"
        for tile in items
    )
    return f'<dl class="q-tiles">{"".join(cells)}</dl>'


@dataclass(frozen=True, slots=True)
class Cell:
    value: str
    css: str = ""


def table(head: Sequence[str], rows: Iterable[Sequence[Cell]], left: int = 1) -> str:
    """`head` is HTML; the first `left` columns are text, the others numbers."""

    def css(place: int, own: str = "") -> str:
        names = f"{'l ' if place < left else ''}{own}".strip()
        return f' class="{names}"' if names else ""

    heads = "".join(f"<th scope=col{css(i)}>{cell}</th>" for i, cell in enumerate(head))
    body = "".join(
        "<tr>"
        + "".join(f"<td{css(i, cell.css)}>{text(cell.value)}</td>" for i, cell in enumerate(row))
        + "</tr>"
        for row in rows
    )
    return f'<div class="q-scroll"><table class="q-table"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def stacked_bar(
    parts: Sequence[tuple[str, float, str]], figure: Callable[[float], str], *, label: str, beside: str = ""
) -> str:
    """Parts of a whole side by side, with their key. A part: name (HTML), size, colour; `figure` tells a size, `label` all of it
    to those who do not see it, `beside` is HTML that ends the key."""
    whole = sum(size for _, size, _ in parts) or 1
    bar = "".join(
        f'<i style="width:{100 * size / whole:.3f}%;background:{colour}"></i>' for _, size, colour in parts
    )
    key = "".join(
        f'<span style="--c:{colour}">{name} <b>{figure(size)}</b></span>' for name, size, colour in parts
    )
    return (
        f'<div class="q-ledger" role="img" aria-label="{text(label)}">{bar}</div>'
        f'<div class="q-key">{key}{beside}</div>'
    )


def panel(kind: str, heading: str, body: str, facts: Iterable[tuple[str, object]] = ()) -> str:
    """A notice; `kind` is info, warn or bad."""
    rows = "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in facts)
    listed = f"<dl>{rows}</dl>" if rows else ""
    role = "alert" if kind == "bad" else "status"
    return (
        f'<div class="q-panel {kind}" role="{role}"><h3>{text(heading)}</h3><p>{text(body)}</p>{listed}</div>'
    )


def chip(kind: str, label: str) -> str:
    """A small state with shape and colour; `kind` is ok, busy, warn, bad or idle."""
    return f'<span class="q-chip small {kind}">{text(label)}</span>'


def alias_chips(aliases: Iterable[str]) -> str:
    return "".join(f'<span class="q-alias">@{text(alias)}</span>' for alias in aliases)


def version_name(name: str, version: int | str | None, digest: str, aliases: Iterable[str] = ()) -> str:
    """A version as every page shows it: its colour, name, number, aliases and the first eight of its digest."""
    place = theme.colour_index(digest or f"{name}/{version}")
    number = "" if version is None else f" v{text(version)}"
    identity = f'<span class="q-mono q-muted">{text(digest[:8])}</span>' if digest else ""
    return (
        f'<span class="q-version"><i style="background:var(--q-c{place})"></i><b>{text(name)}{number}</b>'
        f"{alias_chips(aliases)}{identity}</span>"
    )


def html_table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1, css: str = "") -> str:
    """Like `table`, for cells that are HTML already."""
    heads = "".join(
        f"<th scope=col{' class=l' if i < left else ''}>{cell}</th>" for i, cell in enumerate(head)
    )
    body = "".join(
        "<tr>"
        + "".join(f"<td{' class=l' if i < left else ''}>{cell}</td>" for i, cell in enumerate(row))
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="q-scroll"><table class="q-table {css}"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def error_panel(heading: str, error: BaseException) -> str:
    """A typed error with its value, limit and remedy; of an unknown one its type and text."""
    facts = [
        ("value", getattr(error, "value", None)),
        ("limit", getattr(error, "limit", None)),
        ("what to do", getattr(error, "remedy", None)),
        ("id in the log", getattr(error, "code", None) or type(error).__name__),
    ]
    told = getattr(error, "message", None) or str(error) or type(error).__name__
    return panel("bad", heading, told, [(name, value) for name, value in facts if value not in (None, "")])


@cache
def stylesheet(name: ThemeName) -> str:
    variables = "".join(f"{key}:{value};" for key, value in theme.css_variables(name).items())
    rules = Path(__file__).with_name("style.css").read_text("utf-8")
    return f"<style>:root{{{variables}}}\n{rules}</style>"
