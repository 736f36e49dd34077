"""StructuredOutputsParams: what a request's output must look like: a JSON schema, a regular expression, a choice, a grammar, a tag.

Boundary: what was asked, checked for its form. Whether a grammar can be made of it is found when it is compiled.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any

from engine.errors import InvalidParamsError
from engine.structural_tag import as_tag

KINDS = ("json", "json_object", "regex", "choice", "grammar", "structural_tag")


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """One kind of constraint on the whole output of a request; names and meanings follow vLLM's.

    An output that its length cuts (finish reason "length") is a beginning of what was asked for. A JSON schema is enforced as a
    whole or refused (``engine.json_schema``); objects have no properties but declared ones, in the schema's order.

    Raises:
        InvalidParamsError: none or several kinds, or one of the wrong form.
    """

    json: str | None = None  # a JSON schema; also given as a mapping, kept as compact JSON text
    json_object: bool = False  # any JSON object
    regex: str | None = None  # the whole output matches it
    choice: tuple[str, ...] | None = None  # one of these texts
    grammar: str | None = None  # EBNF as xgrammar reads it; its root rule is `root`
    structural_tag: str | None = (
        None  # parts, free or not (``engine.structural_tag``); also given as a mapping
    )
    any_whitespace: bool = (
        True  # json: blanks and line breaks where JSON allows them; False: the compact form alone
    )

    def __post_init__(self) -> None:
        given = [name for name in KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise InvalidParamsError(
                f"structured_outputs needs exactly one of {', '.join(KINDS)}, got {', '.join(given) or 'none'}",
                value=given,
                limit=1,
                param="structured_outputs",
            )
        if self.json is not None:
            object.__setattr__(self, "json", _as_schema(self.json))
        if self.structural_tag is not None:
            object.__setattr__(self, "structural_tag", as_tag(self.structural_tag))
        if self.choice is not None:
            object.__setattr__(self, "choice", _as_choice(self.choice))
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise InvalidParamsError(
                    f"structured_outputs.{name} must be a text that is not empty, got {value!r}",
                    value=value,
                    param=f"structured_outputs.{name}",
                )

    @property
    def kind(self) -> str:
        """The name of the field that says what is asked for."""
        return next(name for name in KINDS if getattr(self, name) not in (None, False))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StructuredOutputsParams:
        """Build from plain values; an unknown key raises instead of being dropped."""
        known = {each.name for each in fields(cls)}
        for key in values:
            if key not in known:
                raise InvalidParamsError(
                    f"unknown field structured_outputs.{key}",
                    value=key,
                    limit=sorted(known),
                    param="structured_outputs",
                )
        return cls(**values)


def _as_schema(given: Any) -> str:
    """The schema as compact JSON text. Keys keep their order: it is the order of the output."""
    try:
        schema = json.loads(given) if isinstance(given, str) else given
        if not isinstance(schema, (dict, bool)):
            raise TypeError("a JSON schema is an object")
        return json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidParamsError(
            f"structured_outputs.json is no JSON schema ({error})",
            value=given,
            param="structured_outputs.json",
        ) from error


def _as_choice(given: Any) -> tuple[str, ...]:
    texts = (given,) if isinstance(given, str) else tuple(given)
    if not texts or any(not isinstance(each, str) or not each for each in texts):
        raise InvalidParamsError(
            f"structured_outputs.choice must hold texts that are not empty, got {given!r}",
            value=given,
            param="structured_outputs.choice",
        )
    return texts
