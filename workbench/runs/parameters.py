"""Parameters of a notebook: read from its parameters cell, and values checked against them before anything runs.

The cell holds plain annotated scalars, one a line, with what they mean and their unit behind a ``#``::

    max_tokens: int = 64  # output tokens of a request
    note: str | None = None  # shown beside the run

papermill would lose the second line and only warn of a misspelt name; both are refused or read here.

Boundary: text and values. Finding notebooks is ``workbench.runs.notebooks``', running them ``workbench.runs.job``'s.
"""

from __future__ import annotations

import ast
import difflib
import io
import math
import tokenize
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from workbench.runs.errors import NotebookFormatError, NotebookParameterError

Scalar = bool | int | float | str | None
_TYPES: dict[str, type] = {"bool": bool, "int": int, "float": float, "str": str}
_TRUE, _FALSE, _NONE = ("true", "1", "yes", "on"), ("false", "0", "no", "off"), ("none", "null", "")


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a notebook."""

    name: str
    type: str  # bool, int, float, str
    optional: bool  # None is a value too
    default: Scalar
    comment: str  # meaning and unit

    @property
    def type_text(self) -> str:
        return f"{self.type} | None" if self.optional else self.type


def parse_parameters(source: str, where: str) -> tuple[Parameter, ...]:
    """The parameters of a cell's source. `where` names the notebook in errors.

    Raises:
        NotebookFormatError: anything but annotated scalars with a default of their type.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise NotebookFormatError(
            f"{where}: the parameters cell cannot be read: {error.msg}, line {error.lineno}", value=error.text
        ) from error  # fmt: skip
    comments = _comments(source)
    found = [_parameter(node, comments, where) for node in tree.body]
    names = [each.name for each in found]
    for name in names:
        if names.count(name) > 1:
            raise NotebookFormatError(f"{where}: parameter {name!r} is there twice", value=name, param=name)
    return tuple(found)


def check_values(parameters: Sequence[Parameter], values: Mapping[str, Any], where: str) -> dict[str, Scalar]:
    """Every parameter with its value: the given one, else the default.

    Raises:
        NotebookParameterError: an unknown name, or a value of another type.
    """
    known = _known(parameters, values, where)
    return {
        name: _checked(each, values[name]) if name in values else each.default for name, each in known.items()
    }


def read_assignments(
    parameters: Sequence[Parameter], assignments: Sequence[str], where: str
) -> dict[str, Scalar]:
    """Values from ``name=value`` texts, as a command line has them; only those that were given.

    Raises:
        NotebookParameterError: no ``=``, an unknown name, or a text that cannot be read as the parameter's type.
    """
    given: dict[str, str] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise NotebookParameterError(
                f"{assignment!r} is no assignment", value=assignment, limit="name=value", param=name,
                remedy=f"Write -p {name or 'name'}=value.",
            )  # fmt: skip
        given[name.strip()] = text
    known = _known(parameters, given, where)
    return {name: _checked(known[name], _read(known[name], text)) for name, text in given.items()}


def _known(parameters: Sequence[Parameter], names: Iterable[str], where: str) -> dict[str, Parameter]:
    known = {each.name: each for each in parameters}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            raise NotebookParameterError(
                f"notebook {where!r} has no parameter {name!r}", value=name, limit=sorted(known), param=str(name),
                remedy=f"Did you mean {near[0]!r}?" if near else f"It has: {', '.join(known) or 'none'}.",
            )  # fmt: skip
    return known


def _parameter(node: ast.stmt, comments: Mapping[int, str], where: str) -> Parameter:
    if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None):
        raise NotebookFormatError(
            f"{where}: line {node.lineno} of the parameters cell is no parameter: {ast.unparse(node)[:80]}",
            value=ast.unparse(node)[:80], limit="name: type = value",
            remedy="Keep only lines like `max_tokens: int = 64  # output tokens` there.",
        )  # fmt: skip
    name = node.target.id
    kind, optional = _type(node.annotation, name, where)
    try:
        default = ast.literal_eval(node.value)
    except ValueError:
        raise NotebookFormatError(
            f"{where}: parameter {name!r} has no plain default: {ast.unparse(node.value)[:80]}", param=name,
            value=ast.unparse(node.value)[:80], limit="a number, a text, True, False or None",
        ) from None  # fmt: skip
    blank = Parameter(name, kind, optional, None, comments.get(node.end_lineno or node.lineno, ""))
    try:
        value = _checked(blank, default)
    except NotebookParameterError as error:
        raise NotebookFormatError(
            f"{where}: the default of {error.message}", value=default, param=name
        ) from None
    return Parameter(blank.name, kind, optional, value, blank.comment)


def _type(annotation: ast.expr, name: str, where: str) -> tuple[str, bool]:
    parts = [part.strip() for part in ast.unparse(annotation).split("|")]
    kinds = [part for part in parts if part != "None"]
    if len(kinds) != 1 or kinds[0] not in _TYPES:
        raise NotebookFormatError(
            f"{where}: parameter {name!r} has the type {ast.unparse(annotation)}", value=ast.unparse(annotation),
            limit=[*_TYPES, "each with | None"], param=name, remedy="Use a plain scalar.",
        )  # fmt: skip
    return kinds[0], len(parts) > 1


def _comments(source: str) -> dict[int, str]:
    """Line -> its comment; a comment on a line of its own belongs to the parameter below it."""
    found: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line = token.start[0] + (0 if token.line[: token.start[1]].strip() else 1)
            found.setdefault(line, token.string.lstrip("#").strip())
    return found


def _checked(parameter: Parameter, value: Any) -> Scalar:
    if value is None and parameter.optional:
        return None
    wanted = _TYPES[parameter.type]
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    right = isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool))
    if not right or (isinstance(value, float) and not math.isfinite(value)):
        raise NotebookParameterError(
            f"parameter {parameter.name!r} is {value!r}, not {parameter.type_text}", value=value,
            limit=parameter.type_text, param=parameter.name, remedy=parameter.comment or None,
        )  # fmt: skip
    checked: Scalar = value
    return checked


def _read(parameter: Parameter, text: str) -> Any:
    """What `text` means as the parameter's type; the text itself when it means nothing."""
    word = text.strip().lower()
    if parameter.optional and word in _NONE:
        return None
    if parameter.type == "bool":
        return True if word in _TRUE else False if word in _FALSE else text
    if parameter.type in ("int", "float"):
        try:
            return _TYPES[parameter.type](text)
        except ValueError:
            return text
    return text
