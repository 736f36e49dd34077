"""Structural tags: free text beside what follows a schema; what would not be enforced is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import xgrammar

from engine.errors import InvalidParamsError
from engine.fake_tokenizer import FakeTokenizer
from engine.grammar import MAX_VOCABULARIES, Compiled, GrammarCompiler
from engine.sampling_params import SamplingParams
from engine.structural_tag import json_part
from engine.structured_outputs import StructuredOutputsParams

TOKENIZER = FakeTokenizer()
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}},
    "required": ["x"],
    "additionalProperties": False,
}
CALL = {"type": "tag", "begin": "<call>", "content": json_part(POINT), "end": "</call>"}


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(TOKENIZER, vocab_size=TOKENIZER.vocab_size, eos_token_ids=TOKENIZER.eos_token_ids)


def ask(compiler: GrammarCompiler, part: dict[str, Any]) -> Compiled:
    structured = StructuredOutputsParams(structural_tag={"type": "structural_tag", "format": part})  # type: ignore[arg-type]
    compiled = compiler.grammar_of(SamplingParams(structured_outputs=structured))
    assert compiled is not None
    return compiled


def accepts(compiled: Compiled, text: str) -> bool:
    matcher = xgrammar.GrammarMatcher(compiled.grammar.compiled)
    return all(matcher.accept_token(token) for token in TOKENIZER.encode(text)) and matcher.is_completed()


def test_text_is_free_and_what_is_between_markers_follows_its_schema(compiler: GrammarCompiler):
    compiled = ask(compiler, {"type": "triggered_tags", "triggers": ["<call>"], "tags": [CALL]})
    assert accepts(compiled, "no call at all")
    assert accepts(compiled, 'well: <call>{"x": 1}</call> and <call>{"x":2}</call>.')
    assert not accepts(compiled, '<call>{"x": "1"}</call>')
    assert not accepts(compiled, "<call>")


def test_an_answer_follows_free_text(compiler: GrammarCompiler):
    thought = {"type": "tag", "begin": "", "content": {"type": "any_text"}, "end": "</think>"}
    compiled = ask(compiler, {"type": "sequence", "elements": [thought, json_part(POINT)]})
    assert accepts(compiled, 'it may be {"x": "y"} or not</think>{"x":1}')
    assert not accepts(compiled, 'so</think>{"x": "y"}')
    assert not accepts(compiled, '{"x":1}')


def test_special_tokens_are_markers_where_a_tag_writes_them_out_and_nothing_else(compiler: GrammarCompiler):
    tag = {"type": "tag", "begin": "", "content": {"type": "any_text"}, "end": "<|tool|>"}
    compiled = ask(compiler, {"type": "sequence", "elements": [tag, json_part(POINT)]})
    assert accepts(compiled, 'a thought<|tool|>{"x": 1}')
    assert not accepts(compiled, 'a <|user|> thought<|tool|>{"x": 1}')
    named = ask(compiler, tag | {"begin": "<|tool|>", "content": json_part({"type": "string"})})
    assert accepts(named, '<|tool|>"a"<|tool|>')
    assert not accepts(named, '<|tool|>"a<|tool|>"<|tool|>')


def test_markers_that_the_model_cannot_say_are_none():
    special = max(TOKENIZER.special_token_ids - TOKENIZER.eos_token_ids)
    smaller = GrammarCompiler(TOKENIZER, vocab_size=special, eos_token_ids=TOKENIZER.eos_token_ids)
    text = TOKENIZER.token_text(special)
    compiled = ask(smaller, {"type": "tag", "begin": text, "content": json_part(POINT), "end": ""})
    assert not accepts(compiled, text + '{"x": 1}')


def test_the_older_form_is_read_as_todays(compiler: GrammarCompiler):
    older = {"structures": [{"begin": "<call>", "schema": POINT, "end": "</call>"}], "triggers": ["<call>"]}
    structured = StructuredOutputsParams(structural_tag=json.dumps(older))
    compiled = compiler.grammar_of(SamplingParams(structured_outputs=structured))
    assert compiled is not None
    assert accepts(compiled, 'well <call>{"x": 1}</call>')


@pytest.mark.parametrize(
    ("part", "where", "what"),
    [
        ({"type": "any_tokens"}, "format", "no part that is known"),
        ({"type": "json_schema", "json_schema": POINT, "any_order": True}, "format.any_order", "not known"),
        (json_part({"type": "string", "contentEncoding": "base64"}), "format.json_schema", "contentEncoding"),
        ({"type": "regex", "pattern": "(?=a)b"}, "format.pattern", "pattern"),
        ({"type": "tag", "begin": 3, "content": {"type": "any_text"}, "end": ""}, "format.begin", "text"),
        ({"type": "sequence", "elements": []}, "format.elements", "not empty"),
        ({"type": "const_string"}, "structural_tag", "compiled"),
        ({"type": "any_text", "excludes": [3]}, "structural_tag", "compiled"),
    ],
)
def test_what_would_not_be_enforced_is_refused_by_its_place(compiler: GrammarCompiler, part, where, what):
    with pytest.raises(InvalidParamsError, match=what) as caught:
        ask(compiler, part)
    assert caught.value.param is not None
    assert caught.value.param.endswith(where)


def test_parts_too_deep_inside_each_other_are_refused(compiler: GrammarCompiler):
    part: dict[str, Any] = {"type": "any_text"}
    for _ in range(20):
        part = {"type": "optional", "content": part}
    with pytest.raises(InvalidParamsError, match="17 parts deep"):
        ask(compiler, part)


def test_a_tag_that_never_compiles_is_ended():
    slow = GrammarCompiler(
        TOKENIZER, vocab_size=TOKENIZER.vocab_size, eos_token_ids=TOKENIZER.eos_token_ids, max_seconds=0.5
    )
    try:
        with pytest.raises(InvalidParamsError, match="takes more than"):
            ask(slow, {"type": "regex", "pattern": "[a-z]?" * 1500})
    finally:
        slow.close()


def test_vocabularies_of_many_markers_are_not_all_kept(compiler: GrammarCompiler):
    small = GrammarCompiler(TOKENIZER, vocab_size=TOKENIZER.vocab_size, eos_token_ids=TOKENIZER.eos_token_ids)
    names = TOKENIZER.SPECIAL[1:]
    for number in range(1, 1 << len(names)):
        value = "".join(name for i, name in enumerate(names) if number >> i & 1)
        compiled = ask(small, {"type": "const_string", "value": value})
        assert accepts(compiled, value)
    assert len(small._tools) == MAX_VOCABULARIES
