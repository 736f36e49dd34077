"""Which JSON schemas are enforced to the last keyword; every other one is refused, by the name of what would be ignored.

xgrammar reads JSON Schema and passes over what it has no grammar for, alone or beside certain other keywords. A schema that
comes through here is enforced as a whole: whatever the grammar lets through validates. Where it is narrower than the schema:
objects have no properties but those that are declared, in that order; `pattern` has to match the whole text; `format` is a
matter of form (the 31st of February is a date).

Boundary: reads schemas, compiles nothing. Source: xgrammar 0.2.8, each rule by instances that it takes and a validator does not
(``tests/engine/structured/test_json_schema.py``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from engine.errors import InvalidParamsError
from engine.regex_syntax import check_regex

MAX_DEPTH = 64  # schemas inside each other

MAX_PARTS = 512  # of a small schema: every value in it is one
COUNT_PARTS = 8  # that a length or a number of items counts as, for each of its units

# Say nothing about what is valid.
_ANNOTATIONS = frozenset(
    ("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "discriminator",
     "$schema", "$id", "$comment", "$defs", "definitions"),
)  # fmt: skip
_OF_TYPE = {
    "object": frozenset(
        (
            "properties",
            "required",
            "additionalProperties",
            "minProperties",
            "maxProperties",
            "patternProperties",
            "propertyNames",
        )
    ),
    "array": frozenset(("items", "prefixItems", "minItems", "maxItems")),
    "string": frozenset(("minLength", "maxLength", "pattern", "format")),
    "integer": frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")),
    "number": frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")),
    "boolean": frozenset(),
    "null": frozenset(),
}
FORMATS = frozenset(
    ("email", "date", "time", "date-time", "duration", "ipv4", "ipv6", "hostname", "uuid", "uri", "uri-reference",
     "uri-template", "json-pointer", "relative-json-pointer"),
)  # fmt: skip
_RANGE = _OF_TYPE["number"]
# What a schema says with one of these, it says with it alone.
_ALONE = ("$ref", "anyOf", "oneOf", "allOf", "enum", "const")
_COUNTS = frozenset(("minLength", "maxLength", "minItems", "maxItems"))
_UNBOUNDED = frozenset(("pattern", "patternProperties"))
_PYTHON_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "integer": (int,), "number": (int, float),
    "boolean": (bool,), "null": (type(None),),
}  # fmt: skip


def enforceable(text: str) -> str:
    """The schema in the form that is compiled: as it was given, objects and arrays that say nothing about their content hold any.

    Raises:
        InvalidParamsError: naming what would not be enforced, and where.
    """
    try:
        return json.dumps(_Reader(json.loads(text)).schema((), 0), ensure_ascii=False)
    except (TypeError, AttributeError) as error:  # a keyword's value of another kind than the keyword's
        raise _refusal((), f"is no JSON schema ({error})") from error


def is_small(text: str) -> bool:
    """Whether an enforceable schema compiles within a moment, whatever it says: few parts, short counts, no expressions."""
    left = MAX_PARTS
    found = [json.loads(text)]
    while found and left >= 0:
        part = found.pop()
        if isinstance(part, Mapping):
            if not _UNBOUNDED.isdisjoint(part):
                return False
            counts = [value for key, value in part.items() if key in _COUNTS and isinstance(value, int)]
            left -= COUNT_PARTS * sum(counts)
            found += part.values()
        elif isinstance(part, list):
            found += part
        left -= 1
    return left >= 0


class _Reader:
    """Reads one schema; places are paths of keys from its root."""

    def __init__(self, root: Any) -> None:
        self._root = root

    def schema(self, path: tuple[str, ...], depth: int, given: Any = ...) -> Any:
        schema = self._root if given is ... else given
        if depth > MAX_DEPTH:
            raise _refusal(path[:8], f"is {depth} schemas deep", limit=MAX_DEPTH)
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, Mapping):
            raise _refusal(path, f"is no schema but {schema!r}")
        plain = {key: value for key, value in schema.items() if key not in _ANNOTATIONS}
        read: dict[str, Any] = {}
        for name in ("$defs", "definitions"):
            if name in schema:
                read[name] = self._each(schema[name], (*path, name), depth)
        alone = next((name for name in _ALONE if name in plain), None)
        if alone is not None:
            return read | self._alone(alone, plain, path, depth)
        return read | self._typed(plain, path, depth)

    def _each(self, schemas: Any, path: tuple[str, ...], depth: int) -> dict[str, Any]:
        if not isinstance(schemas, Mapping):
            raise _refusal(path, f"maps no names to schemas but is {schemas!r}")
        return {name: self.schema((*path, name), depth + 1, each) for name, each in schemas.items()}

    def _alone(
        self, name: str, plain: Mapping[str, Any], path: tuple[str, ...], depth: int
    ) -> dict[str, Any]:
        beside = set(plain) - {name} - ({"type"} if name in ("enum", "const") else set())
        if beside:
            raise _refusal(
                path, f"has {_names(beside)} beside {name}", remedy="Say it inside, or leave one out."
            )
        value = plain[name]
        if name == "$ref":
            self._resolve(value, path)
            return {"$ref": value}
        if name in ("enum", "const"):
            _check_values([value] if name == "const" else value, plain.get("type"), (*path, name))
            return {name: value}
        if not isinstance(value, list) or not value:
            raise _refusal((*path, name), f"is no list of schemas but {value!r}")
        if name == "allOf" and len(value) > 1:
            raise _refusal(path, "has allOf with several schemas", remedy="Write them as one.")
        options = [self.schema((*path, name, str(i)), depth + 1, each) for i, each in enumerate(value)]
        if name == "oneOf":
            self._check_disjoint(value, (*path, name))
            return {"anyOf": options}
        return {name: options}

    def _typed(self, plain: Mapping[str, Any], path: tuple[str, ...], depth: int) -> dict[str, Any]:
        given = plain.get("type")
        types = given if isinstance(given, list) else [] if given is None else [given]
        for name in types:
            if name not in _OF_TYPE:
                raise _refusal(path, f"has the type {name!r}", limit=sorted(_OF_TYPE))
        if given is None:  # both say it themselves
            types = ["object"] * ("properties" in plain) + ["array"] * bool(
                {"items", "prefixItems"} & set(plain)
            )
        known = frozenset({"type"}).union(*(_OF_TYPE[name] for name in types))
        unknown = set(plain) - known
        if unknown:
            remedy = "Give its type." if not types else "Leave it out."
            raise _refusal(path, f"has {_names(unknown)}, which would not be enforced", remedy=remedy)
        read = dict(plain)
        if "object" in types:
            read |= self._object(plain, path, depth)
        if "array" in types:
            read |= self._array(plain, path, depth)
        if "string" in types:
            _check_string(plain, path)
        if "multipleOf" in plain and ("number" in types or _RANGE & set(plain)):
            raise _refusal(
                path, "has multipleOf of a number or in a range", remedy='Use it with "integer" alone.'
            )
        return read

    def _object(self, plain: Mapping[str, Any], path: tuple[str, ...], depth: int) -> dict[str, Any]:
        kinds = [name for name in ("properties", "patternProperties", "propertyNames") if name in plain]
        if len(kinds) > 1:
            raise _refusal(path, f"has {_names(kinds)} together", remedy="Use one of them.")
        read: dict[str, Any] = {}
        properties = plain.get("properties", {})
        others = plain.get("additionalProperties", True)
        if kinds == ["properties"]:
            read["properties"] = self._each(properties, (*path, "properties"), depth)
            if not isinstance(others, bool):
                raise _refusal(
                    path, "has additionalProperties with a schema beside properties", remedy="Make it false."
                )
            read["additionalProperties"] = False
        elif kinds == ["patternProperties"]:
            patterns = plain["patternProperties"]
            read["patternProperties"] = self._each(patterns, (*path, "patternProperties"), depth)
            if others is not False or len(patterns) != 1:
                raise _refusal(
                    path, "has patternProperties beside other properties", remedy="Use one, and additionalProperties false."
                )  # fmt: skip
            for pattern in patterns:
                check_regex(pattern, where=_place((*path, "patternProperties")), in_json=True)
        else:
            read["additionalProperties"] = self.schema((*path, "additionalProperties"), depth + 1, others)
        if kinds == ["propertyNames"]:
            names = plain["propertyNames"]
            if (
                not isinstance(names, Mapping)
                or set(names) - {"pattern", "type"}
                or "additionalProperties" in plain
            ):
                raise _refusal(path, "has propertyNames with more than a pattern")
            _check_string(names, (*path, "propertyNames"))
            del read["additionalProperties"]
        missing = set(plain.get("required", ())) - set(properties)
        if missing:
            raise _refusal(path, f"requires {_names(missing)}, which properties does not declare")
        if plain.get("minProperties", 0) > 1 and not properties:
            raise _refusal(path, "has minProperties without properties", remedy="Declare them.")
        return read

    def _array(self, plain: Mapping[str, Any], path: tuple[str, ...], depth: int) -> dict[str, Any]:
        read: dict[str, Any] = {}
        if "prefixItems" in plain:
            items = plain["prefixItems"]
            if not isinstance(items, list):
                raise _refusal((*path, "prefixItems"), f"is no list of schemas but {items!r}")
            read["prefixItems"] = [
                self.schema((*path, "prefixItems", str(i)), depth + 1, each) for i, each in enumerate(items)
            ]
        if "items" in plain or "prefixItems" not in plain:
            read["items"] = self.schema((*path, "items"), depth + 1, plain.get("items", True))
        return read

    # ── references and alternatives ─────────────────────────────────────────────────────────────────────────────────

    def _resolve(self, reference: Any, path: tuple[str, ...]) -> Any:
        """What a reference inside the schema names."""
        found: Any = self._root
        if not isinstance(reference, str) or (reference != "#" and not reference.startswith("#/")):
            raise _refusal(path, f"refers to {reference!r}", remedy="Refer into the schema, as #/$defs/NAME.")
        parts = reference.split("/")[1:]
        if "oneOf" in parts:
            raise _refusal(path, f"refers to {reference!r}, inside of oneOf", remedy="Move it to $defs.")
        for part in parts:
            key = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(found, Mapping) or key not in found:
                raise _refusal(path, f"refers to {reference!r}, which is not there")
            found = found[key]
        return found

    def _check_disjoint(self, options: Iterable[Any], path: tuple[str, ...]) -> None:
        """One of several, and no other: what is generated for one must not be valid for another, so they must differ plainly."""
        seen: list[Mapping[str, Any]] = []
        for option in options:
            reached = self._reached(option, path)
            if not all(_differ(reached, other, self, path) for other in seen):
                raise _refusal(path, "has alternatives that may overlap", remedy="Use anyOf.")
            seen.append(reached)

    def _reached(self, schema: Any, path: tuple[str, ...]) -> Mapping[str, Any]:
        """The schema behind its references."""
        for _ in range(MAX_DEPTH):
            if not isinstance(schema, Mapping) or "$ref" not in schema:
                break
            schema = self._resolve(schema["$ref"], path)
        return schema if isinstance(schema, Mapping) else {}

    def constant_properties(self, schema: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, set[str]]:
        """Required properties that have one of few values, with these as JSON."""
        found = {}
        for name in schema.get("required", ()):
            each = self._reached(schema.get("properties", {}).get(name), path)
            if (values := _values(each)) is not None:
                found[name] = values
        return found


def _differ(a: Mapping[str, Any], b: Mapping[str, Any], reader: _Reader, path: tuple[str, ...]) -> bool:
    """Whether no value is valid for both, as far as types, constants and constant properties say."""
    types = [_types(each) for each in (a, b)]
    if types[0] and types[1] and not types[0] & types[1]:
        return True
    values = [_values(each) for each in (a, b)]
    if values[0] is not None and values[1] is not None:
        return not values[0] & values[1]
    if types != [{"object"}, {"object"}]:
        return False
    ours, theirs = reader.constant_properties(a, path), reader.constant_properties(b, path)
    return any(not ours[name] & theirs[name] for name in ours.keys() & theirs.keys())


def _types(schema: Mapping[str, Any]) -> set[str]:
    given = schema.get("type", "object" if "properties" in schema else [])
    types = set(given if isinstance(given, list) else [given])
    return types | {"integer"} if "number" in types else types


def _values(schema: Mapping[str, Any]) -> set[str] | None:
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    # 1 and 1.0 are one value of JSON Schema
    return (
        None
        if values is None
        else {json.dumps(float(v) if _is_number(v) else v, sort_keys=True) for v in values}
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_values(values: Any, given: Any, path: tuple[str, ...]) -> None:
    """Values of an enumeration are of the type beside it."""
    if not isinstance(values, list) or not values:
        raise _refusal(path, f"is no list of values but {values!r}")
    types = [] if given is None else given if isinstance(given, list) else [given]
    for value in values:
        fits = (
            isinstance(value, _PYTHON_TYPES.get(name, ())) and (not isinstance(value, bool) or name == "boolean")
            for name in types
        )  # fmt: skip
        if types and not any(fits):
            raise _refusal(path, f"has {value!r}, which is not of the type {given!r}")


def _check_string(plain: Mapping[str, Any], path: tuple[str, ...]) -> None:
    chosen = [name for name in ("pattern", "format") if name in plain]
    lengths = [name for name in ("minLength", "maxLength") if name in plain]
    if len(chosen) + bool(lengths) > 1:
        raise _refusal(path, f"has {_names(chosen + lengths)} together", remedy="Use one of them.")
    if "format" in plain and plain["format"] not in FORMATS:
        raise _refusal(path, f"has the format {plain['format']!r}", limit=sorted(FORMATS))
    if "pattern" in plain:
        check_regex(plain["pattern"], where=_place((*path, "pattern")), in_json=True)


def _names(keys: Iterable[str]) -> str:
    return ", ".join(sorted(keys))


def _place(path: tuple[str, ...]) -> str:
    return "/".join(("structured_outputs.json", *path))


def _refusal(
    path: tuple[str, ...], what: str, *, limit: Any = None, remedy: str | None = None
) -> InvalidParamsError:
    return InvalidParamsError(
        f"{_place(path)} {what}",
        value="#/" + "/".join(path),
        limit=limit,
        remedy=remedy,
        param="structured_outputs.json",
    )
