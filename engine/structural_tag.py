"""Structural tags: outputs made of parts, free text beside what follows a schema: xgrammar's format, which vLLM's requests bring.

A tag is checked as a whole before it is compiled: its JSON schemas are enforced or refused as those of whole outputs
(``engine.json_schema``), its regular expressions too; parts that are not listed here are refused by name.

Boundary: reads tags, compiles nothing. Source: xgrammar 0.2.8, ``structural_tag.py``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from engine.errors import InvalidParamsError
from engine.json_schema import enforceable, is_small
from engine.regex_syntax import check_regex

SPECIAL = "\x01"  # begins the text of special tokens here: no text has it, least of all within JSON
MAX_DEPTH = 16  # parts inside each other
_MARKERS = frozenset(("begin", "end", "triggers", "value", "separator"))
WHERE = "structured_outputs.structural_tag"
_FIELDS = {
    "const_string": frozenset(("value",)),
    "any_text": frozenset(("excludes",)),
    "json_schema": frozenset(("json_schema", "max_whitespace_cnt")),
    "regex": frozenset(("pattern",)),
    "grammar": frozenset(("grammar",)),
    "sequence": frozenset(("elements",)),
    "or": frozenset(("elements",)),
    "optional": frozenset(("content",)),
    "tag": frozenset(("begin", "content", "end")),
    "triggered_tags": frozenset(("triggers", "tags", "at_least_one", "stop_after_first", "excludes")),
    "tags_with_separator": frozenset(("tags", "separator", "at_least_one", "stop_after_first")),
}


def checked_tag(text: str, max_blanks: int) -> str:
    """The tag in the form that is compiled. `max_blanks`: between two parts of a JSON text, where it says nothing of them.

    Raises:
        InvalidParamsError: naming the part that is not one, or would not be enforced.
    """
    return json.dumps(
        {
            "type": "structural_tag",
            "format": _Reader(max_blanks).part(json.loads(text)["format"], "format", 1),
        },
        ensure_ascii=False,
    )


def as_tag(given: Any) -> str:
    """A tag as compact JSON text, from a mapping or JSON; older ones, of `structures` and `triggers`, in today's form.

    Raises:
        InvalidParamsError: it is none.
    """
    try:
        tag = json.loads(given) if isinstance(given, str) else given
        if isinstance(tag, Mapping) and "structures" in tag:
            tag = {"format": _of_structures(tag)}
        if not isinstance(tag, Mapping) or not isinstance(tag.get("format"), Mapping):
            raise TypeError("it needs a format")
        return json.dumps(
            {"type": "structural_tag", "format": tag["format"]}, ensure_ascii=False, separators=(",", ":")
        )
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise InvalidParamsError(
            f"{WHERE} is no structural tag ({error})", value=given, param=WHERE
        ) from error


def json_part(schema: str | Mapping[str, Any]) -> dict[str, Any]:
    """A part that follows a JSON schema; it may have blanks between its own parts."""
    return {"type": "json_schema", "json_schema": json.loads(schema) if isinstance(schema, str) else schema}


def is_small_tag(text: str) -> bool:
    """Whether a checked tag compiles within a moment, whatever it says."""
    return is_small(text) and '"type": "grammar"' not in text


def markers_in(part: Any) -> Iterator[str]:
    """The texts that a checked tag has around its parts, and between them."""
    if isinstance(part, list):
        for each in part:
            yield from markers_in(each)
    elif isinstance(part, dict):
        for name, value in part.items():
            if name in _MARKERS:
                yield from [value] if isinstance(value, str) else value
            elif name != "json_schema":
                yield from markers_in(value)


def with_special_tokens(part: Any, texts: Iterable[str]) -> Any:
    """The tag with SPECIAL before each of the texts where it is a marker, so that one token alone writes it, and it writes nothing else."""
    found = re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))
    return _marked(part, found)


def _marked(part: Any, found: re.Pattern[str], name: str = "") -> Any:
    if name == "json_schema":
        return part
    if isinstance(part, str):
        return found.sub(lambda match: SPECIAL + match[0], part) if name in _MARKERS else part
    if isinstance(part, list):
        return [_marked(each, found, name) for each in part]
    if isinstance(part, dict):
        return {key: _marked(value, found, key) for key, value in part.items()}
    return part


def _of_structures(tag: Mapping[str, Any]) -> dict[str, Any]:
    tags = [
        {"type": "tag", "begin": each["begin"], "content": json_part(each["schema"]), "end": each["end"]}
        for each in tag["structures"]
    ]
    return {"type": "triggered_tags", "triggers": tag["triggers"], "tags": tags}


class _Reader:
    def __init__(self, max_blanks: int) -> None:
        self._max_blanks = max_blanks

    def part(self, given: Any, path: str, depth: int) -> dict[str, Any]:
        """One part, read; `path`: where it stands."""
        if not isinstance(given, Mapping) or given.get("type") not in _FIELDS:
            kind = given.get("type") if isinstance(given, Mapping) else given
            raise _refusal(path, f"is {kind!r}, which is no part that is known", kind, sorted(_FIELDS))
        if depth > MAX_DEPTH:
            raise _refusal(path, f"is {depth} parts deep", depth, MAX_DEPTH)
        kind, fields = given["type"], {name: value for name, value in given.items() if name != "type"}
        for name in fields:
            if name not in _FIELDS[kind]:
                raise _refusal(
                    f"{path}.{name}", f"is not known in {kind}", fields[name], sorted(_FIELDS[kind])
                )
        if kind == "json_schema":
            return self._json(fields, path)
        for name in _MARKERS & fields.keys():
            self._check_marker(fields[name], f"{path}.{name}")
        if kind == "regex":
            check_regex(_text(fields, "pattern", path), where=f"{WHERE}.{path}.pattern")
        for name in ("elements", "tags"):
            if name in fields:
                fields[name] = self._parts(fields[name], f"{path}.{name}", depth)
        if "content" in fields:
            fields["content"] = self.part(fields["content"], f"{path}.content", depth + 1)
        return {"type": kind, **fields}

    def _parts(self, given: Any, path: str, depth: int) -> list[dict[str, Any]]:
        if not isinstance(given, list) or not given:
            raise _refusal(path, "must be a list that is not empty", given)
        return [self.part(each, f"{path}.{i}", depth + 1) for i, each in enumerate(given)]

    def _check_marker(self, given: Any, path: str) -> None:
        """One text, or several; a tag's may be empty."""
        texts = given if isinstance(given, list) and given else [given]
        if not all(isinstance(text, str) for text in texts):
            raise _refusal(path, "must be a text, or a list of texts", given)

    def _json(self, fields: dict[str, Any], path: str) -> dict[str, Any]:
        where = f"{path}.json_schema"
        if not isinstance(fields.get("json_schema"), Mapping | bool):
            raise _refusal(where, "must be a JSON schema", fields.get("json_schema"))
        try:
            schema = json.loads(enforceable(json.dumps(fields["json_schema"])))
        except InvalidParamsError as error:
            raise InvalidParamsError(
                f"{WHERE}.{where}: {error.message}", value=error.value, limit=error.limit, remedy=error.remedy,
                param=f"{WHERE}.{where}",
            ) from error  # fmt: skip
        blanks = fields.get("max_whitespace_cnt")
        if blanks is not None and (not isinstance(blanks, int) or not 1 <= blanks <= self._max_blanks):
            raise _refusal(f"{path}.max_whitespace_cnt", "is not within its limits", blanks, self._max_blanks)
        return {
            "type": "json_schema", "json_schema": schema,
            "max_whitespace_cnt": self._max_blanks if blanks is None else blanks,
        }  # fmt: skip


def _text(fields: Mapping[str, Any], name: str, path: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not value:
        raise _refusal(f"{path}.{name}", "must be a text that is not empty", value)
    return value


def _refusal(path: str, what: str, value: Any, limit: Any = None) -> InvalidParamsError:
    return InvalidParamsError(f"{WHERE}.{path} {what}", value=value, limit=limit, param=f"{WHERE}.{path}")
