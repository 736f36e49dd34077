"""Texts side by side, with what differs from the reference marked in each: word by word, underlined as well as coloured."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from workbench.ui import markup

_WORDS = re.compile(r"\s+|\w+|[^\w\s]")
MAX_WORDS = 2000  # beyond this a text is shown without marks: the comparison is quadratic at worst


@dataclass(frozen=True, slots=True)
class Side:
    """One column. `heading` is HTML, `text` is text."""

    heading: str
    text: str


def as_html(sides: Sequence[tuple[Side, str | None]]) -> str:
    """The columns, each with its reference: words that are not in it at their place are marked. Without one nothing is."""
    columns = "".join(
        f"<div><h4>{side.heading}</h4><pre>{marked(side.text, reference) or '<span class=q-muted>(no text)</span>'}</pre></div>"
        for side, reference in sides
    )
    return f'<div class="q-sides">{columns}</div>'


def marked(text: str, reference: str | None) -> str:
    """`text` as HTML with what differs from `reference` marked."""
    if reference is None or text == reference:
        return markup.text(text)
    words, others = _WORDS.findall(text), _WORDS.findall(reference)
    if len(words) > MAX_WORDS or len(others) > MAX_WORDS:
        return markup.text(text)
    parts = []
    matcher = difflib.SequenceMatcher(None, others, words, autojunk=False)
    for kind, _, _, start, end in matcher.get_opcodes():
        piece = markup.text("".join(words[start:end]))
        if kind == "equal" or not piece:
            parts.append(piece if kind != "delete" else "<mark title='missing here'>∅</mark>")
        else:
            parts.append(f"<mark>{piece}</mark>")
    return "".join(parts)


def readable(value: Any) -> str:
    """A text as it is; JSON, also as text, with an entry a line so that differences line up."""
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except ValueError:
            return value
        return readable(parsed) if isinstance(parsed, dict | list) else value
    return json.dumps(value, ensure_ascii=False, indent=1, sort_keys=True)
