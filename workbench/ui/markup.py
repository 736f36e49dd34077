"""Escaped HTML for the pages' own parts. Everything that did not come from this package goes through `text`."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
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


def panel(kind: str, heading: str, body: str, facts: Iterable[tuple[str, object]] = ()) -> str:
    """A notice; `kind` is info, warn or bad."""
    rows = "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in facts)
    listed = f"<dl>{rows}</dl>" if rows else ""
    role = "alert" if kind == "bad" else "status"
    return (
        f'<div class="q-panel {kind}" role="{role}"><h3>{text(heading)}</h3><p>{text(body)}</p>{listed}</div>'
    )


@cache
def stylesheet(name: ThemeName) -> str:
    variables = "".join(f"{key}:{value};" for key, value in theme.css_variables(name).items())
    rules = Path(__file__).with_name("style.css").read_text("utf-8")
    return f"<style>:root{{{variables}}}\n{rules}</style>"
