"""Whether an answer has the form that it was asked to have: JSON that parses, one of the choices; or where it was cut.

Expressions and grammars are not run again here: a hostile one could hold the page for minutes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from engine.request import FinishReason

if TYPE_CHECKING:
    from workbench.ui.answers import Answer

_CUTS = {
    FinishReason.LENGTH: "cut by the token limit",
    FinishReason.ABORT: "stopped",
    FinishReason.ERROR: "broken off",
    FinishReason.TIMEOUT: "waited too long",
}


@dataclass(frozen=True, slots=True)
class Shape:
    """The verdict in words; `tree` is JSON that has something inside."""

    kind: Literal["ok", "warn", "bad", ""]  # "": nothing that is checked here
    told: str
    tree: dict[str, Any] | list[Any] | None = None


def shape_of(answer: Answer) -> Shape | None:
    """Of an answer that has ended; None where any form would do."""
    asked, completion = answer.params.structured_outputs, answer.completion
    if asked is None or completion is None:
        return None
    content = answer.output.content
    cut = _CUTS.get(completion.finish_reason)
    if asked.json is not None or asked.json_object:
        return _json(content, cut)
    if asked.choice is not None and content in asked.choice:
        return Shape("ok", "one of the choices")
    if cut is not None:
        return Shape("warn", f"{cut}: not whole")
    if asked.choice is not None:
        return Shape("bad", "none of the choices")
    return Shape(
        "",
        "ended by itself, under the regular expression"
        if asked.regex
        else "ended by itself, under the grammar",
    )


def _json(text: str, cut: str | None) -> Shape:
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        if cut is not None:
            return Shape("warn", f"{cut}: the JSON is not whole")
        return Shape("bad", f"no JSON: {error}")
    return Shape("ok", "JSON parses", value if isinstance(value, dict | list) else None)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON value")
