"""What an answer must look like, and which tools it may call: controls that say what is wrong under their own field.

Bound to the page's address, as all controls of a chat are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import streamlit as st

from engine.errors import TypedError
from engine.structured_outputs import StructuredOutputsParams
from workbench.chat_request import Tools, read_tools
from workbench.ui.glossary import tip


@dataclass(frozen=True, slots=True)
class Form:
    """A kind of constraint with its text: which field of StructuredOutputsParams that is."""

    field: str
    example: str
    read: Callable[[str], Any] = str


FORMS = {
    "JSON schema": Form("json", '{"type": "object", "properties": {"city": {"type": "string"}}}'),
    "JSON object": Form("json_object", ""),
    "Regular expression": Form("regex", r"\d{4}-\d{2}-\d{2}"),
    "Choice": Form("choice", "yes\nno", lambda text: tuple(line for line in text.splitlines() if line)),
    "EBNF grammar": Form("grammar", 'root ::= "yes" | "no"'),
}
ANY = "Anything"


@dataclass(frozen=True, slots=True)
class OutputControls:
    """What is set; `error` says why it cannot be used."""

    structured: StructuredOutputsParams | None = None
    tools: Tools = ()
    error: str | None = None


def show() -> OutputControls:
    """Render the controls."""
    structured: StructuredOutputsParams | None = None
    tools: Tools = ()
    errors: list[str] = []
    with _told(errors):
        structured = _structured()
    with _told(errors):
        tools = _tools()
    return OutputControls(structured, tools, errors[0] if errors else None)


@contextmanager
def _told(errors: list[str]) -> Iterator[None]:
    """Say what cannot be used right here."""
    try:
        yield
    except TypedError as error:
        st.error(str(error), icon="⚠️")
        errors.append(str(error))


def _structured() -> StructuredOutputsParams | None:
    kind = st.selectbox(
        "Output must be",
        [ANY, *FORMS],
        key="output",
        bind="query-params",
        help=tip("structured output"),
    )
    form = FORMS.get(kind)
    if form is None:
        return None
    white = {}
    if form.field.startswith("json"):
        compact = st.toggle("Compact", key="output_compact", bind="query-params", help=tip("compact"))
        white = {"any_whitespace": not compact}
    if not form.example:
        return StructuredOutputsParams.from_dict({form.field: True, **white})
    text = st.text_area(
        kind, key=f"output_{form.field}", bind="query-params", height=120, placeholder=form.example
    )
    return StructuredOutputsParams.from_dict({form.field: form.read(text or ""), **white})


def _tools() -> Tools:
    text = st.text_area(
        "Tools", key="tools", bind="query-params", height=120, help=tip("tools"),
        placeholder='[{"type": "function", "function": {"name": …, "parameters": {…}}}]',
    )  # fmt: skip
    return read_tools(text or "")
