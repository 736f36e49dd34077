"""The verdict of a comparison with its reasons: in words, with a sign, and in the colour of its meaning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from workbench.ui import markup

_LOOKS = {
    "promote": ("ok", "✓", "Promote"),
    "not_proven": ("warn", "?", "Not proven"),
    "refuse": ("bad", "✕", "Refuse"),
}


def normal(verdict: object) -> str:
    """`promote`, `not_proven` or `refuse`, whatever the writer's case."""
    return str(getattr(verdict, "value", verdict)).lower().replace(" ", "_").replace("-", "_")


def kind_of(verdict: object) -> str:
    return _LOOKS.get(normal(verdict), ("info", "", ""))[0]


def label(verdict: object) -> str:
    found = _LOOKS.get(normal(verdict))
    return f"{found[1]} {found[2]}" if found else str(verdict)


def as_html(verdict: object, reasons: Sequence[Any], about: str = "") -> str:
    """`about` says in a sentence what was judged."""
    kind, sign, told = _LOOKS.get(normal(verdict), ("info", "", str(verdict)))
    listed = "".join(_reason(reason) for reason in reasons)
    return (
        f'<div class="q-panel q-verdict {kind}" role="status"><h3>{sign} {markup.text(told)}</h3>'
        f"<p>{markup.text(about)}</p><ul>{listed}</ul></div>"
    )


def _reason(reason: Any) -> str:
    """One rule's finding: its own outcome and its text; a plain text is told as it is."""
    if not isinstance(reason, Mapping):
        return f"<li>{markup.text(reason)}</li>"
    return f'<li class="{kind_of(reason.get("outcome"))}">{markup.text(reason.get("text") or reason.get("rule"))}</li>'
