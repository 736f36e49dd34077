"""Which regular expressions are enforced as they are written; others are refused by the name of what would be passed over.

xgrammar refuses most of what it does not have (lookaround, back references, flags, word boundaries) and reads the rest in its own
way: an anchor inside is dropped, an unknown escape is its letter. In a JSON text, a literal quote, backslash or control character
would come out unescaped. Boundary: reads expressions, compiles nothing. Source: xgrammar 0.2.8.
"""

from __future__ import annotations

import re
from typing import Any

from engine.errors import InvalidParamsError

_PARTS = re.compile(
    r"\\.|\[(?:\\.|[^\]\\])*\]|\(\?<?[=!]|.", re.DOTALL
)  # an escape, a class, a lookaround, one character
_CLASSES = "dDwWsS"
_LITERALS = "nrtfv0xuc"  # escapes that stand for one character
_CONTROL = "nrtfv0xuc"


def check_regex(pattern: Any, *, where: str, in_json: bool = False) -> None:
    """Refuse what would not be enforced as it is written. `where`: its name in errors; `in_json`: it is about a JSON text's content.

    Raises:
        InvalidParamsError: naming it.
    """
    if not isinstance(pattern, str):
        raise _refusal(pattern, where, f"is no expression but {pattern!r}")
    parts = _PARTS.findall(pattern)
    for i, part in enumerate(parts):
        if part.startswith("(?"):
            raise _refusal(pattern, where, f"looks around with {part}")
        if part == "^" and i and parts[i - 1] != "|":
            raise _refusal(pattern, where, "has ^ inside")
        if part == "$" and i < len(parts) - 1 and parts[i + 1] != "|":
            raise _refusal(pattern, where, "has $ inside")
        if part.startswith("[[:"):
            raise _refusal(pattern, where, f"has the class {part}")
        for escape in re.findall(r"\\(.)", part, re.DOTALL) if len(part) > 1 else ():
            if escape.isalnum() and escape not in _CLASSES + _LITERALS:
                raise _refusal(pattern, where, f"has \\{escape}")
        if in_json and _needs_escape(part):
            raise _refusal(pattern, where, f"has {part!r}, which JSON writes with an escape")


def _needs_escape(part: str) -> bool:
    """Whether a literal of an expression is a character that JSON does not write as itself."""
    if part.startswith("["):
        return False  # classes never give such a character
    return part == '"' or part < " " or part == "\\\\" or (part[0] == "\\" and part[1] in _CONTROL)


def _refusal(pattern: Any, where: str, what: str) -> InvalidParamsError:
    return InvalidParamsError(
        f"{where} {what}, which would not be enforced as it is written", value=pattern, param=where
    )
