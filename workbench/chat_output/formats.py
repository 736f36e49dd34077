"""The formats of tool calls, by vLLM's names (``--tool-call-parser``), and how a model's is recognised. `quire`: the bundled model's.

A model's format is what its chat template speaks of, or, where it has a format's markers as single tokens, that one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.chat_output.bodies import Accepts, CallList, MistralCalls, NamedCall, TaggedCall
from workbench.chat_output.parser import CallParser
from workbench.chat_output.pieces import PieceLog
from workbench.chat_output.pythonic import PythonicCalls
from workbench.chat_output.qwen_xml import QwenXmlCall

if TYPE_CHECKING:
    from engine.tokenizer import TokenizerLike

Schemas = Mapping[str, Mapping[str, Any]]  # each tool's parameters, by its name


@dataclass(frozen=True, slots=True)
class CallFormat:
    """One way to write tool calls."""

    parser: Callable[[PieceLog, Schemas], CallParser]
    marker: str = ""  # before a call; "": a call is known by how the output begins
    end: str = ""  # behind each call
    short_ids: bool = False  # its templates take ids of 9 letters and digits alone
    arguments_key: str | None = (
        None  # a call is a JSON object with this key behind `opening`; None: it is no object
    )
    opening: str = ""


def _tagged(start: str, end: str, opening: str) -> CallFormat:
    def parser(log: PieceLog, _: Schemas) -> CallParser:
        return CallParser(log, marker=start, body=lambda prefix: TaggedCall(log, prefix, end, _any_name))

    return CallFormat(parser, start, end, arguments_key="arguments", opening=opening)


def _qwen_xml(start: str, end: str) -> CallFormat:
    def parser(log: PieceLog, schemas: Schemas) -> CallParser:
        return CallParser(log, marker=start, body=lambda prefix: QwenXmlCall(log, prefix, end, schemas))

    return CallFormat(parser, start, end)


def _mistral(marker: str) -> CallFormat:
    def parser(log: PieceLog, _: Schemas) -> CallParser:
        return CallParser(log, marker=marker, body=lambda prefix: MistralCalls(log, prefix, _any_name))

    return CallFormat(parser, marker, short_ids=True)


def _llama(marker: str) -> CallFormat:
    def parser(log: PieceLog, schemas: Schemas) -> CallParser:
        def calls(prefix: str, accepts: Accepts, is_certain: bool) -> CallList:
            return CallList(
                log, prefix, accepts, opening="", separator=";", closing="", is_certain=is_certain
            )

        return CallParser(
            log, marker=marker, body=lambda prefix: calls(prefix, _any_name, True),
            bare="{", bare_body=lambda prefix: calls(prefix, _known(schemas), False),
        )  # fmt: skip

    return CallFormat(parser, marker, arguments_key="parameters")


def _pythonic(log: PieceLog, schemas: Schemas) -> CallParser:
    return CallParser(log, bare="[", bare_body=lambda prefix: PythonicCalls(log, prefix, _known(schemas)))


def _any_name(_: str) -> bool:
    return True


def _known(schemas: Schemas) -> Accepts:
    """What has no marker might be an answer: it is a call where a tool has its name, as far as the tools are known."""
    return schemas.__contains__ if schemas else _any_name


CALL_FORMATS = {
    "quire": _tagged("<|tool_call|>", "<|/tool_call|>", opening="<|tool_call|>"),
    "hermes": _tagged("<tool_call>", "</tool_call>", opening="<tool_call>\n"),
    "qwen3_coder": _qwen_xml("<tool_call>", "</tool_call>"),
    "mistral": _mistral("[TOOL_CALLS]"),
    "llama3_json": _llama("<|python_tag|>"),
    "pythonic": CallFormat(_pythonic),
}

# What a template says of its model's calls, the most telling first.
_SIGNS = (
    ("qwen3_coder", "<function="),
    ("hermes", "<tool_call>"),
    ("mistral", "[TOOL_CALLS]"),
    ("pythonic", "func_name1("),
    ("llama3_json", "<|python_tag|>"),
    ("llama3_json", '"parameters": dictionary'),
)


def json_object() -> CallFormat:
    """All of the output is one call, ``{"name": …, "arguments": {…}}``: what a model writes behind its marker."""

    def parser(log: PieceLog, _: Schemas) -> CallParser:
        def calls(prefix: str) -> CallList:
            return CallList(log, prefix, _any_name, opening="", separator="", closing="", is_certain=True)

        return CallParser(log, bare="{", bare_body=calls)

    return CallFormat(parser)


def json_list() -> CallFormat:
    """Not a model's: all of the output is ``[{"name": …, "parameters": {…}}, …]``, as a grammar has it."""

    def parser(log: PieceLog, _: Schemas) -> CallParser:
        def calls(prefix: str) -> CallList:
            return CallList(log, prefix, _any_name, opening="[", separator=",", closing="]", is_certain=True)

        return CallParser(log, bare="[", bare_body=calls)

    return CallFormat(parser)


def json_arguments(name: str) -> CallFormat:
    """Not a model's: all of the output is the arguments of one call of that name."""

    def parser(log: PieceLog, _: Schemas) -> CallParser:
        return CallParser(log, bare="{", bare_body=lambda prefix: NamedCall(log, prefix, _any_name, name))

    return CallFormat(parser)


def find_call_format(tokenizer: TokenizerLike) -> str | None:
    """The name of the model's format; None when it has no way to call a tool that is known here."""
    template = tokenizer.chat_template or ""
    for name, sign in _SIGNS:
        if sign in template:
            return name
    for name, each in CALL_FORMATS.items():
        markers = [text for text in (each.marker, each.end) if text]
        if markers and all(is_one_token(tokenizer, text) for text in markers):
            return name
    return None


def is_one_token(tokenizer: TokenizerLike, text: str) -> bool:
    return len(tokenizer.encode(text, add_special_tokens=False)) == 1


def formats_in(text: str) -> list[str]:
    """The formats whose marker stands in a text, for texts whose model is not at hand."""
    return [name for name, each in CALL_FORMATS.items() if each.marker and each.marker in text]
