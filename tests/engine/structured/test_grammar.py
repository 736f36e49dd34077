"""Grammars are compiled once per content, within bounds; what never ends is ended."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import xgrammar

from engine.errors import InvalidParamsError
from engine.fake_tokenizer import FakeTokenizer
from engine.grammar import Compiled, GrammarCompiler
from engine.json_schema import is_small
from engine.sampling_params import SamplingParams
from engine.structured_outputs import StructuredOutputsParams

TOKENIZER = FakeTokenizer()


def make_compiler(**options: object) -> GrammarCompiler:
    return GrammarCompiler(
        TOKENIZER, vocab_size=TOKENIZER.vocab_size + 3, eos_token_ids=TOKENIZER.eos_token_ids, **options
    )


def ask(compiler: GrammarCompiler, **kind: object) -> Compiled:
    compiled = compiler.grammar_of(SamplingParams(structured_outputs=StructuredOutputsParams(**kind)))
    assert compiled is not None
    return compiled


def accepts(compiled: Compiled, text: str) -> bool:
    matcher = xgrammar.GrammarMatcher(compiled.grammar.compiled)
    return matcher.accept_string(text.encode()) and matcher.is_completed()


def test_a_choice_is_these_texts_and_no_other():
    texts = ("yes", "ye", 'a "quoted" \\ one', "é😀", "two\nlines", "[a]|(b)*")
    compiled = ask(make_compiler(), choice=texts)
    assert all(accepts(compiled, text) for text in texts)
    assert not any(accepts(compiled, text) for text in ("y", "yesye", "", "a", "[a]"))


def test_special_tokens_and_ids_without_a_token_are_never_allowed():
    compiled = ask(make_compiler(), choice=("<|user|>",))
    matcher = xgrammar.GrammarMatcher(compiled.grammar.compiled)
    for byte in b"<|user|>":
        assert matcher.accept_token(byte)
    assert not matcher.accept_token(TOKENIZER.encode("<|user|>")[0])
    assert not matcher.accept_token(TOKENIZER.vocab_size + 1)
    assert matcher.accept_token(TOKENIZER.EOS)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string"},
        {"type": "string", "minLength": 1, "maxLength": 8},
        {"type": "string", "pattern": "^[^a]{3}$"},
    ],
)
def test_no_text_of_a_json_output_holds_a_control_character(shared: GrammarCompiler, schema):
    compiled = ask(shared, json=json.dumps(schema))
    for byte in range(32):
        matcher = xgrammar.GrammarMatcher(compiled.grammar.compiled)
        assert matcher.accept_token(ord('"'))
        assert not matcher.accept_token(byte), byte


def test_one_content_is_compiled_once_also_by_many_at_once():
    compiler = make_compiler()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: ask(compiler, choice=(f"text {i % 2}",)), range(8)))
    assert len({id(compiled.grammar) for compiled in found}) == 2
    assert sum(compiled.compile_ms > 0 for compiled in found) == 2


def test_the_least_recently_used_is_given_up_for_others():
    size = ask(make_compiler(), choice=("text 0",)).grammar.num_bytes
    compiler = make_compiler(max_bytes=3 * size)
    first, second, _ = (ask(compiler, choice=(f"text {i}",)).grammar for i in range(3))
    assert ask(compiler, choice=("text 0",)).grammar is first
    ask(compiler, choice=("text 3",))
    assert ask(compiler, choice=("text 0",)).grammar is first
    assert ask(compiler, choice=("text 1",)).grammar is not second


def test_what_never_compiles_is_ended_and_others_go_on():
    compiler = make_compiler(max_seconds=3.0)  # a busy machine takes a while for what does compile
    try:
        with pytest.raises(InvalidParamsError, match="more than 3 s") as caught:
            ask(compiler, regex="[a-z]?" * 1500)
        assert (caught.value.limit, caught.value.param) == (3.0, "structured_outputs.regex")
        assert accepts(ask(compiler, regex="(ab)+"), "abab")
    finally:
        compiler.close()


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ({"regex": "(a"}, "parenthesis"),
        ({"regex": "(a)\\1"}, "\\1"),
        ({"regex": "a(?=b)"}, "looks around"),
        ({"regex": "a^b"}, "^"),
        ({"regex": "\\Aa"}, "\\A"),
        ({"grammar": 'root ::= "a'}, "EBNF"),
        ({"grammar": 'start ::= "a"'}, "root"),
        ({"grammar": "root ::= root"}, "no output"),
        ({"json": json.dumps({"type": "integer", "minimum": 5, "maximum": 3})}, "minimum"),
    ],
)
def test_what_cannot_be_compiled_is_refused_with_its_reason(shared: GrammarCompiler, kind, named):
    with pytest.raises(InvalidParamsError) as caught:
        ask(shared, **kind)
    assert named in str(caught.value)
    assert caught.value.param == f"structured_outputs.{next(iter(kind))}"


@pytest.fixture(scope="module")
def shared():
    compiler = make_compiler()
    yield compiler
    compiler.close()


def test_small_schemas_need_no_process():
    strings = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(40)}}
    assert is_small(json.dumps(strings))
    assert is_small(json.dumps({"type": "string", "maxLength": 40}))
    assert not is_small(json.dumps({"type": "string", "maxLength": 100}))
    assert not is_small(json.dumps({"enum": [f"value {i}" for i in range(600)]}))
    assert not is_small(json.dumps({"type": "array", "items": {"type": "string", "pattern": "a"}}))
