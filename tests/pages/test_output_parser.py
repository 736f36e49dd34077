"""Reasoning, content and calls of an output are found, however its text is cut into pieces."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from page_world import ToolTokenizer

from workbench.ui.answer_parts import OutputParser, gather, output_syntax

TOOLS = ({"type": "function", "function": {"name": "weather"}},)
TOKENIZER = ToolTokenizer()
CALL = '<tool_call>{"name":"weather","arguments":{"city":"Ulm"}}</tool_call>'


def parts_of(parser: OutputParser, pieces: list[str]) -> tuple[str, str, list[tuple[str, str]]]:
    found = gather([piece for text in pieces for piece in parser.push(text)] + parser.finish())
    return found.reasoning, found.content, [(call.name, call.arguments) for call in found.calls]


OUTPUTS = [
    ("plain", ("", "plain", [])),
    ("", ("", "", [])),
    ("<thin ice", ("", "<thin ice", [])),
    (" <think>\na < b\n</think>\n\nYes.", ("a < b", "Yes.", [])),
    ("<think>never ends </thin", ("never ends </thin", "", [])),
    ("so <think>not at the beginning</think>", ("", "so <think>not at the beginning</think>", [])),
    (f"<think>x</think>Look: {CALL}.", ("x", "Look: .", [("weather", '{"city":"Ulm"}')])),
    (f"<think>{CALL}</think>no call", (CALL, "no call", [])),
    ("<tool_call>{broken</tool_call>", ("", "<tool_call>{broken</tool_call>", [])),
]


@given(output=st.sampled_from(OUTPUTS), data=st.data())
def test_any_cut_of_an_output_gives_the_same_parts(output, data):
    text, parts = output
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parts_of(output_syntax(TOKENIZER, (), TOOLS).parser(), pieces) == parts


def test_tag_that_the_template_opened_is_not_expected_again():
    prompt = TOKENIZER.encode("<|user|>2+2?<|end|><|assistant|><think>\n")
    parser = output_syntax(TOKENIZER, prompt).parser()
    assert parts_of(parser, ["four", "</think>", "\n", "4"]) == ("four", "4", [])
