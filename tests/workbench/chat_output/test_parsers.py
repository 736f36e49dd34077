"""Parsers of model outputs: each format's calls, what is given back, and that the chunks of a stream change nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from workbench.chat_output import CallArguments, CallStart, Content, OutputSyntax, Piece, Reasoning, gather
from workbench.chat_output.formats import CALL_FORMATS, json_arguments, json_list, json_object
from workbench.chat_output.reasoning import THINK

SCHEMAS: dict[str, Any] = {
    "weather": {
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "units": {"enum": ["C", "F"]},
                       "odd": {"type": [{}, 3]}, "box": {"type": ["array", "null"]}, "now": {"type": "boolean"}},
    },
    "time": {},
}  # fmt: skip
FORMATS = {
    **CALL_FORMATS, "json_object": json_object(), "json_list": json_list(), "json_arguments": json_arguments("weather"),
}  # fmt: skip


def syntax(name: str, **more: Any) -> OutputSyntax:
    return OutputSyntax(FORMATS[name], SCHEMAS, **more)


def pieces_of(chunks: list[str], how: OutputSyntax) -> list[Piece]:
    """The pieces, neighbours of one kind joined, ids left out."""
    parser = how.parser()
    joined: list[Piece] = []
    for piece in [piece for chunk in chunks for piece in parser.push(chunk)] + parser.finish():
        last = joined[-1] if joined else None
        match piece, last:
            case Content(text), Content(before):
                joined[-1] = Content(before + text)
            case Reasoning(text), Reasoning(before):
                joined[-1] = Reasoning(before + text)
            case CallArguments(index, text), CallArguments(of, before) if of == index:
                joined[-1] = CallArguments(index, before + text)
            case CallStart(), _:
                joined.append(replace(piece, id=""))
            case _:
                joined.append(piece)
    return joined


def read(text: str, how: OutputSyntax) -> tuple[str, list[tuple[str, Any]]]:
    """Content and calls of a whole output."""
    found = gather(pieces_of([text], how))
    return found.content, [(call.name, json.loads(call.arguments)) for call in found.calls]


ULM, ULM_3 = {"city": "Ulm"}, {"city": "Ulm", "days": 3}
XML = "<tool_call>\n<function=weather>\n<parameter=city>\nUlm\n</parameter>\n<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"
CALLS = [
    ("quire", 'Hm.<|tool_call|>{"name":"weather","arguments":{"city":"Ulm"}}<|/tool_call|>', "Hm.", [("weather", ULM)]),
    ("hermes", '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>', "", [("weather", ULM)]),
    ("hermes", '<tool_call>{"arguments": {"city": "Ulm"}, "name": "weather"}</tool_call>', "", [("weather", ULM)]),
    ("hermes", '<tool_call>{"name": "time"}</tool_call> Done', " Done", [("time", {})]),
    ("hermes", '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Ulm\\"}"}</tool_call>', "", [("weather", ULM)]),
    ("hermes", 'a\n<tool_call>{"name": "time", "arguments": {}}</tool_call>\n<tool_call>{"name": "weather", "arguments": '
               '{"city": "}{\\"\\\\"}, "id": 1}</tool_call>\n', "a", [("time", {}), ("weather", {"city": '}{"\\'})]),
    ("hermes", '<tool_call>{"name": "time", "arguments": {}}', "", [("time", {})]),  # the end marker is missing
    ("qwen3_coder", f"I look.\n\n{XML}\n{XML}", "I look.", [("weather", ULM_3)] * 2),
    ("qwen3_coder", "<tool_call><function=time></function></tool_call>", "", [("time", {})]),
    ("qwen3_coder", "<tool_call><function=weather><parameter=now>True</parameter><parameter=box>[1, 2]</parameter>"
                    "<parameter=days>many</parameter><parameter=odd>1</parameter><parameter=city>5</parameter></function></tool_call>",
     "", [("weather", {"now": True, "box": [1, 2], "days": "many", "odd": "1", "city": "5"})]),
    ("llama3_json", '{"name": "weather", "parameters": {"city": "Ulm"}}', "", [("weather", ULM)]),
    ("llama3_json", '{"type": "function", "name": "weather", "parameters": {"city": "Ulm"}}', "", [("weather", ULM)]),
    ("llama3_json", '<|python_tag|>{"name": "weather", "parameters": {"city": "Ulm"}}; {"name": "time", "parameters": {}}',
     "", [("weather", ULM), ("time", {})]),
    ("mistral", '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Ulm"}}, {"name": "time", "arguments": {}}]',
     "", [("weather", ULM), ("time", {})]),
    ("mistral", 'So:[TOOL_CALLS]weather[ARGS]{"city": "Ulm"}[TOOL_CALLS]time[CALL_ID]123456789[ARGS]{}', "So:",
     [("weather", ULM), ("time", {})]),
    ("mistral", '[TOOL_CALLS]weather{"city": "Ulm"}', "", [("weather", ULM)]),
    ("pythonic", '[weather(city="Ulm", days=3), time()]', "", [("weather", ULM_3), ("time", {})]),
    ("pythonic", " [weather(city='a)]\\'', box=[1, {'a': None, 'b': true}])]", "",
     [("weather", {"city": "a)]'", "box": [1, {"a": None, "b": True}]})]),
    ("json_list", '[{"name": "weather", "parameters": {"city": "Ulm"}}, {"name": "time", "parameters": {}}]', "",
     [("weather", ULM), ("time", {})]),
    ("json_object", '{"name": "weather", "arguments": {"city": "Ulm"}}', "", [("weather", ULM)]),
    ("json_arguments", '{"city": "Ulm", "days": 3}', "", [("weather", ULM_3)]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "content", "calls"), CALLS)
def test_calls_are_found_in_each_format(name: str, text: str, content: str, calls: list[Any]) -> None:
    assert read(text, syntax(name)) == (content, calls)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("quire", "a <b> {c}"),
        ("hermes", '<tool_call>{not json</tool_call> and <tool_call>{"name": "weather"'),
        ("hermes", ' <tool_call>{"name": "weather", "arguments": {"city": Ulm}}</tool_call>!'),
        ("hermes", 'x <tool_call>{"name": "weather", "arguments": {"city": "U'),
        ("hermes", '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>'),
        ("hermes", '<tool_call>{"name": "weather", "arguments": {"city": NaN}}</tool_call>'),
        ("qwen3_coder", "<tool_call><function=weather><parameter=city>Ulm"),
        ("qwen3_coder", "<tool_call>{}</tool_call>"),
        ("llama3_json", '{"city": "Ulm", "name": "no call"}'),
        ("llama3_json", '{"name": "unknown", "parameters": {}}'),
        ("llama3_json", '{"name": "weather", "parameters": {"city"'),
        ("mistral", "[TOOL_CALLS] nothing [ARGS]"),
        ("mistral", '[TOOL_CALLS][{"name": 3}]'),
        ("pythonic", "[1] a footnote, [weather] and [weather(city)]"),
        ("pythonic", "[weather(city=open('x'))]"),
        ("pythonic", "[weather('Ulm')]"),
        ("pythonic", "[weather(days=1e999)]"),
        ("json_list", '[{"name": "weather", "parameters": {"ci'),
        ("json_arguments", '{"city": "Ul'),
    ],
)
def test_what_is_no_call_is_given_back_as_the_model_wrote_it(name: str, text: str) -> None:
    assert read(text, syntax(name)) == (text, [])


def test_a_broken_call_takes_no_other_with_it() -> None:
    good = '<tool_call>{"name": "time", "arguments": {}}</tool_call>'
    for broken in ('<tool_call>{"name": "weather", "arguments": {"city": "U</tool_call>', "<tool_call>{x "):
        assert read(good + broken + good, syntax("hermes")) == (broken.rstrip(), [("time", {})] * 2)
    listed = '[{"name": "time", "arguments": {}}, {"name": "time", "arguments": {]}}]'
    assert read("[TOOL_CALLS]" + listed, syntax("mistral"))[1] == [("time", {})]


def test_the_name_comes_first_and_arguments_come_as_they_are_written() -> None:
    parser = syntax("hermes").parser()
    assert parser.push('<tool_call>{"name": "weather", "argum') == []
    [start, first] = parser.push('ents": {"city": "K')
    assert (start.name, first.text) == ("weather", '{"city": "K')  # type: ignore[union-attr]
    assert parser.push("ö") == [CallArguments(0, "ö")]
    assert parser.push('ln"') == [CallArguments(0, 'ln"')]
    assert (parser.num_calls, parser.push("  }"), parser.num_calls) == (0, [CallArguments(0, "  }")], 1)
    assert parser.push("}\n</tool_") + parser.push("call>\n") + parser.finish() == []


def test_one_call_at_most_where_calls_are_not_parallel() -> None:
    texts = {name: text for name, text, _, calls in CALLS if len(calls) == 2}
    assert set(texts) == {"hermes", "qwen3_coder", "llama3_json", "mistral", "pythonic", "json_list"}
    for name, text in texts.items():
        parser = syntax(name, max_calls=1).parser()
        pieces = parser.push(text + " and so on") + parser.finish()
        assert [p.index for p in pieces if isinstance(p, CallStart)] == [0], name
        assert parser.num_calls == len(gather(pieces).calls) == 1


@pytest.mark.parametrize(
    ("text", "is_open", "reasoning", "content"),
    [
        ("<think>\nHm, <b>.\n</think>\n\nYes", False, "Hm, <b>.", "Yes"),
        ("Hm.\n</think>\n\nYes", True, "Hm.", "Yes"),
        ("<think>\nHm.</think>Yes", True, "Hm.", "Yes"),  # the model repeats what its template wrote
        ("\n<think>\n\n</think>\n\nYes", False, "", "Yes"),
        ("Yes, <think> is a tag</think>", False, "", "Yes, <think> is a tag</think>"),
        ("<think>cut off </thi", False, "cut off </thi", ""),
        ("cut off", True, "cut off", ""),
        ("<thi", False, "", "<thi"),
        ("  ", False, "", "  "),
    ],
)
def test_reasoning_is_split_from_the_answer(text: str, is_open: bool, reasoning: str, content: str) -> None:
    how = OutputSyntax(reasoning=THINK, is_open=is_open)
    for chunks in ([text], list(text)):
        found = gather(pieces_of(chunks, how))
        assert (found.reasoning, found.content) == (reasoning, content)


def test_calls_behind_reasoning_are_found_and_those_within_are_thoughts() -> None:
    call = '<tool_call>{"name": "time", "arguments": {}}</tool_call>'
    found = gather(pieces_of([f"<think>{call}</think>\n{call}"], syntax("hermes", reasoning=THINK)))
    assert (found.reasoning, found.content, len(found.calls)) == (call, "", 1)


# What outputs are made of, so that markers, halves of markers and calls meet in every order.
PARTS = [
    "<tool_call>", "</tool_call>", "<|tool_call|>", "<|/tool_call|>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "<think>",
    "</think>", "<function=weather>", "</function>", "<parameter=city>", "</parameter>", "<tool", "weather", "(", ")", "[", "]",
    "{", "}", '"', "'", "\\", ",", ";", ":", "=", " ", "\n", "x", "ö", '{"name": "weather", "arguments": ', '"city"', "weather(city=",
    '{"name"', '"parameters"', *(text for _, text, _, _ in CALLS),
]  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(sorted(FORMATS)),
    st.lists(st.sampled_from(PARTS), max_size=8).map("".join),
    st.booleans(),
    st.sampled_from([None, 1]),
    st.data(),
)
def test_any_chunks_give_the_pieces_of_the_whole(
    name: str, text: str, is_open: bool, max_calls: int | None, data: st.DataObject
) -> None:
    how = syntax(
        name, reasoning=THINK if is_open or "think" in text else None, is_open=is_open, max_calls=max_calls
    )
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
    whole = pieces_of([text], how)
    assert pieces_of(chunks, how) == whole
    assert pieces_of(list(text), how) == whole


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(CALL_FORMATS)), st.lists(st.sampled_from(PARTS), max_size=8).map("".join))
@example("pythonic", "[weather(city=")
def test_nothing_is_lost(name: str, text: str) -> None:
    """Where no call was whole, the content is the text; else it is the text without the calls."""
    found = gather(pieces_of([text], syntax(name)))
    if not found.calls:
        assert found.content == text
    for call in found.calls:
        assert isinstance(json.loads(call.arguments), dict)
