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
}


@dataclass(frozen=True, slots=True)
class Shape:
    """The verdict in words; `value` is the parsed JSON, if `is_json`."""

    kind: Literal["ok", "warn", "bad", ""]  # "": nothing that is checked here
    told: str
    is_json: bool = False
    value: Any = None


def shape_of(answer: Answer) -> Shape | None:
    """Of an answer that has ended; None where any form would do, and for calls, which have their own."""
    asked, completion = answer.params.structured_outputs, answer.completion
    if asked is None or completion is None or answer.calls:
        return None
    cut = _CUTS.get(completion.finish_reason)
    if asked.json is not None or asked.json_object:
        return _json(answer.content, cut)
    if asked.choice is not None and answer.content in asked.choice:
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
        return Shape("ok", "JSON parses", is_json=True, value=json.loads(text))
    except (ValueError, RecursionError) as error:
        if cut is not None:
            return Shape("warn", f"{cut}: the JSON is not whole")
        return Shape("bad", f"no JSON: {error}")
