"""Parameters cells: what is read, what is refused, and how values are checked before a run."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.runs.errors import NotebookFormatError, NotebookParameterError
from workbench.runs.parameters import Parameter, check_values, parse_parameters, read_assignments

CELL = """
max_tokens: int = 64  # output tokens of a request
# °, of sampling
temperature: float = 1
name: str = "a # b"  # shown
note: str | None = None
fast: bool = False
low: float = -0.5  # s
"""
PARAMETERS = parse_parameters(CELL, "probe")


def test_types_defaults_and_comments_are_read() -> None:
    assert (
        Parameter("max_tokens", "int", False, 64, "output tokens of a request"),
        Parameter("temperature", "float", False, 1.0, "°, of sampling"),
        Parameter("name", "str", False, "a # b", "shown"),
        Parameter("note", "str", True, None, ""),
        Parameter("fast", "bool", False, False, ""),
        Parameter("low", "float", False, -0.5, "s"),
    ) == PARAMETERS
    assert isinstance(PARAMETERS[1].default, float)
    assert PARAMETERS[3].type_text == "str | None"


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        ("x = 1", "no parameter"),
        ("import os", "no parameter"),
        ("x: int", "no parameter"),
        ("x: list = []", "type list"),
        ("x: int | str = 1", "type int | str"),
        ("x: int = 1 + n", "no plain default"),
        ("x: int = 1.5", "not int"),
        ("x: bool = 1", "not bool"),
        ("x: int = True", "not int"),
        ("x: int = None", "not int"),
        ("x: float = 1e999", "not float"),
        ("x: int = 1\nx: int = 2", "twice"),
        ("x: int =", "cannot be read"),
    ],
)
def test_anything_but_annotated_scalars_is_refused(cell: str, reason: str) -> None:
    with pytest.raises(NotebookFormatError, match=reason.replace("|", r"\|")):
        parse_parameters(cell, "probe")


def test_values_win_over_defaults() -> None:
    values = check_values(PARAMETERS, {"max_tokens": 8, "note": "x", "low": 2}, "probe")
    assert values == {
        "max_tokens": 8,
        "temperature": 1.0,
        "name": "a # b",
        "note": "x",
        "fast": False,
        "low": 2.0,
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_token": 8}, "Did you mean 'max_tokens'"),
        ({"nothing_alike": 8}, "It has: max_tokens"),
        ({"max_tokens": "8"}, "not int"),
        ({"max_tokens": 8.0}, "not int"),
        ({"max_tokens": True}, "not int"),
        ({"max_tokens": None}, "not int"),
        ({"fast": 1}, "not bool"),
        ({"low": float("nan")}, "not float"),
        ({"name": 3}, "not str"),
    ],
)
def test_wrong_values_are_refused_by_name(values: dict[str, object], message: str) -> None:
    with pytest.raises(NotebookParameterError, match=message) as caught:
        check_values(PARAMETERS, values, "probe")
    assert caught.value.param == next(iter(values))


def test_assignments_are_read_by_type() -> None:
    texts = ["max_tokens=8", "fast=yes", "note=none", "name=a=b", "low=1e-3"]
    assert read_assignments(PARAMETERS, texts, "probe") == {
        "max_tokens": 8, "fast": True, "note": None, "name": "a=b", "low": 0.001,
    }  # fmt: skip
    for bad in ("max_tokens", "max_tokens=eight", "fast=perhaps", "maxtokens=1"):
        with pytest.raises(NotebookParameterError):
            read_assignments(PARAMETERS, [bad], "probe")


@given(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(), st.booleans())
def test_any_literal_survives_the_cell(a: int, b: float, c: str, d: bool) -> None:
    cell = f"a: int = {a!r}\nb: float = {b!r}  # s\nc: str = {c!r}  # text\nd: bool = {d!r}"
    assert [each.default for each in parse_parameters(cell, "probe")] == [a, b, c, d]
