"""The form of a notebook, generated from its parameters; each value bound to the address, so that a link fills the form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import streamlit as st

if TYPE_CHECKING:
    from workbench.runs.notebooks import Notebook
    from workbench.runs.parameters import Parameter


COLUMNS = 3


def key_of(notebook: str, parameter: str) -> str:
    """The widget's key and the address's parameter."""
    return f"{notebook}.{parameter}"


def show(notebook: Notebook) -> tuple[dict[str, Any], list[str]]:
    """Render the form in columns; the values, and what is wrong with them in words."""
    values: dict[str, Any] = {}
    wrong: list[str] = []
    for place, columns in _pairs(notebook.parameters):
        for column, parameter in zip(place, columns, strict=False):
            with column:
                values[parameter.name], told = _field(notebook.name, parameter)
            if told:
                wrong.append(told)
    return values, wrong


def _pairs(parameters: Sequence[Parameter]) -> list[tuple[Any, Sequence[Parameter]]]:
    return [
        (st.columns(COLUMNS, gap="medium"), parameters[place : place + COLUMNS])
        for place in range(0, len(parameters), COLUMNS)
    ]


def _field(notebook: str, parameter: Parameter) -> tuple[Any, str]:
    key, help = key_of(notebook, parameter.name), parameter.comment or None
    if parameter.type == "bool" and not parameter.optional:
        return st.toggle(parameter.name, bool(parameter.default), key=key, bind="query-params", help=help), ""
    if parameter.type == "int" and not parameter.optional:
        whole = st.number_input(
            parameter.name, value=int(parameter.default or 0), step=1, key=key, bind="query-params", help=help
        )
        return int(whole), ""
    text = st.text_input(
        parameter.name, "" if parameter.default is None else str(parameter.default), key=key, bind="query-params",
        help=help, placeholder="none" if parameter.optional else None,
    )  # fmt: skip
    return read(parameter, text or "")


def read(parameter: Parameter, text: str) -> tuple[Any, str]:
    """What was typed as the parameter's type, or why it is none."""
    if parameter.optional and not text.strip():
        return None, ""
    if parameter.type == "str":
        return text, ""
    if parameter.type == "bool":
        found = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(
            text.strip().lower()
        )
        return found, "" if found is not None else f"{parameter.name} must be true or false, got {text!r}."
    try:
        return (int if parameter.type == "int" else float)(text), ""
    except ValueError:
        kind = "a whole number" if parameter.type == "int" else "a number"
        return None, f"{parameter.name} must be {kind}, got {text!r}."
