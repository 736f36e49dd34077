"""An executed notebook as HTML: each cell's source and what it said. Everything in it is escaped, figures are shown as images.

A notebook's own HTML and scripts are not: what a cell printed must not be able to act on the page.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.ui import markup

if TYPE_CHECKING:
    from workbench.jobs import Job

MAX_TEXT = 20_000  # characters of one output
MAX_IMAGE = 2_000_000  # base64 characters of one figure
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_BASE64 = re.compile(r"[A-Za-z0-9+/=\s]+")


@dataclass(frozen=True, slots=True)
class Output:
    """What a cell said: `text`, `error`, or `image` (base64 PNG)."""

    kind: str
    content: str


@dataclass(frozen=True, slots=True)
class Cell:
    kind: str  # code or markdown
    source: str
    outputs: tuple[Output, ...]


def path_of(job: Job) -> Path | None:
    """The file that the run left; None when there is none."""
    for found in (job.result, job.partial):
        named = (found or {}).get("executed") or (found or {}).get("executed_path")
        if named and Path(str(named)).is_file():
            return Path(str(named))
    return None


def read(path: Path) -> list[Cell]:
    """The cells of a notebook file. Raises OSError or ValueError for a file that is none."""
    content = json.loads(path.read_text("utf-8"))
    return [_cell(cell) for cell in content.get("cells", [])]


def _cell(cell: Mapping[str, Any]) -> Cell:
    outputs = tuple(found for output in cell.get("outputs", []) if (found := _output(output)) is not None)
    return Cell(str(cell.get("cell_type", "")), _text(cell.get("source")), outputs)


def _output(output: Mapping[str, Any]) -> Output | None:
    kind, data = output.get("output_type"), output.get("data") or {}
    if kind == "stream":
        return Output("text", _text(output.get("text")))
    if kind == "error":
        told = "\n".join(output.get("traceback") or []) or f"{output.get('ename')}: {output.get('evalue')}"
        return Output("error", _ANSI.sub("", told))
    image = _text(data.get("image/png"))
    if image and len(image) <= MAX_IMAGE and _BASE64.fullmatch(image):
        return Output("image", re.sub(r"\s", "", image))
    return Output("text", _text(data["text/plain"])) if data.get("text/plain") else None


def _text(value: object) -> str:
    return "".join(map(str, value)) if isinstance(value, list) else str(value or "")


def as_html(cells: Sequence[Cell]) -> str:
    return f'<div class="q-notebook">{"".join(map(_cell_html, cells))}</div>'


def _cell_html(cell: Cell) -> str:
    if cell.kind != "code":
        return f'<div class="q-prose">{markup.text(cell.source)}</div>'
    said = "".join(map(_output_html, cell.outputs))
    return f'<details class="q-doubt"><summary>{markup.text(_summary(cell.source))}</summary><pre class="q-log">{markup.text(cell.source)}</pre></details>{said}'


def _summary(source: str) -> str:
    first = next((line for line in source.splitlines() if line.strip()), "(empty cell)")
    return first if len(first) <= 100 else first[:99] + "…"


def _output_html(output: Output) -> str:
    if output.kind == "image":
        return f'<img alt="figure of the notebook" src="data:image/png;base64,{markup.text(output.content)}">'
    shown = output.content if len(output.content) <= MAX_TEXT else output.content[:MAX_TEXT] + "\n… shortened"
    css = "q-log bad" if output.kind == "error" else "q-log"
    return f'<pre class="{css}">{markup.text(shown)}</pre>'
