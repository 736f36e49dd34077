"""A schema is enforced to the last keyword, or refused by the name of what would not be."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
import xgrammar

from engine.errors import InvalidParamsError
from engine.fake_tokenizer import FakeTokenizer
from engine.grammar import Grammar, GrammarCompiler
from engine.structured_outputs import StructuredOutputsParams

TOKENIZER = FakeTokenizer()
INTEGER, STRING = {"type": "integer"}, {"type": "string"}
A_OBJECT = {"type": "object", "properties": {"a": INTEGER}}


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(TOKENIZER, vocab_size=TOKENIZER.vocab_size, eos_token_ids=TOKENIZER.eos_token_ids)


def compile_schema(compiler: GrammarCompiler, schema: Any, **options: Any) -> Grammar:
    from engine.sampling_params import SamplingParams

    structured = StructuredOutputsParams(json=json.dumps(schema), **options)
    compiled = compiler.grammar_of(SamplingParams(structured_outputs=structured))
    assert compiled is not None
    return compiled.grammar


def accepts(grammar: Grammar, text: str) -> bool:
    matcher = xgrammar.GrammarMatcher(grammar.compiled)
    return matcher.accept_string(text.encode()) and matcher.is_completed()


# Schemas, each with texts that its grammar lets through and texts that it does not. Those let through are also judged by
# jsonschema, so that a wrong expectation here cannot hide a grammar that is too wide.
ENFORCED: list[tuple[Any, list[str], list[str]]] = [
    ({"type": "integer", "minimum": 3, "maximum": 12}, ["3", "7", "12"], ["2", "13", "3.5", '"3"', "03"]),
    ({"type": "integer", "exclusiveMinimum": -3, "exclusiveMaximum": 5}, ["-2", "0", "4"], ["-3", "5"]),
    ({"type": "integer", "multipleOf": 3}, ["6", "9"], ["4", "7"]),
    ({"type": "number", "minimum": 0.5, "maximum": 1.5}, ["0.5", "1", "1.25"], ["0.4", "1.6", "1e5"]),
    ({"type": "number", "exclusiveMinimum": 0}, ["0.5", "7"], ["0", "-1", "-0.5"]),
    ({"type": ["integer", "null"], "minimum": 3}, ["3", "null"], ["2", '"a"']),
    ({"type": "boolean"}, ["true", "false"], ["1", "null"]),
    ({"type": "string", "minLength": 2, "maxLength": 3}, ['"ab"', '"éé"'], ['"a"', '"abcd"']),
    ({"type": "string", "pattern": "^[a-c]+-\\d{2}$"}, ['"ab-12"'], ['"ab-1"', '"d-12"', '"a-12x"']),
    ({"type": "string", "pattern": "^.*$"}, ['"ab"'], ['"a"b"', '"\\"']),
    ({"type": "string", "format": "date"}, ['"2020-01-31"'], ['"2020-13-01"', '"x"']),
    ({"type": "string", "format": "uuid"}, ['"123e4567-e89b-12d3-a456-426614174000"'], ['"x"']),
    ({"type": "array", "items": INTEGER, "minItems": 1, "maxItems": 2}, ["[1]", "[1, 2]"], ["[]", "[1,2,3]", '["a"]']),
    ({"type": "array", "prefixItems": [INTEGER, STRING], "items": False, "minItems": 2}, ['[1,"a"]'], ['["a"]', "[1]"]),
    ({"type": "array"}, ["[]", '[1, {"a": null}]'], ["1", "{}"]),
    ({"type": "object"}, ["{}", '{"a": [1, {"b": null}]}'], ["[]", "1"]),
    (A_OBJECT, ["{}", '{"a": 1}', '{\n "a" :1}'], ['{"a": "x"}', '{"b": 1}']),
    (A_OBJECT | {"required": ["a"], "additionalProperties": True}, ['{"a": 1}'], ["{}", '{"a": 1, "\\u0061": "x"}']),
    ({"type": "object", "properties": {"a": {}, "b": {}}, "maxProperties": 1}, ['{"a": 1}', '{"b": 1}'], ['{"a":1,"b":1}']),
    ({"type": "object", "properties": {"a": {}, "b": {}}, "minProperties": 2}, ['{"a":1,"b":1}'], ['{"a":1}']),
    ({"type": "object", "additionalProperties": INTEGER, "maxProperties": 1}, ["{}", '{"x": 1}'], ['{"x": "y"}', '{"a":1,"b":1}']),
    ({"type": "object", "patternProperties": {"^x[0-9]$": INTEGER}, "additionalProperties": False}, ['{"x1": 1}'], ['{"x1": "a"}', '{"y": 1}']),
    ({"type": "object", "propertyNames": {"pattern": "^x[0-9]$"}}, ['{"x1": 1}'], ['{"y": 1}']),
    ({"enum": [1, "a b", None, {"x": [1, 2]}]}, ["1", '"a b"', "null", '{"x":[1,2]}'], ["2", '"a"']),
    ({"type": "string", "enum": ["a", "b"], "description": "one of two"}, ['"a"'], ['"c"', "1"]),
    ({"const": 'q"\\é'}, ['"q\\"\\\\é"'], ['"q"']),
    ({"anyOf": [INTEGER, {"type": "null"}]}, ["1", "null"], ['"a"']),
    ({"allOf": [{"$ref": "#/$defs/n"}], "$defs": {"n": {"type": "integer", "maximum": 5}}}, ["4"], ["6"]),
    ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, ["1", '"a"'], ["null"]),
    (
        {
            "oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}],
            "discriminator": {"propertyName": "kind"},
            "$defs": {
                kind: {"type": "object", "properties": {"kind": {"const": kind}, "n": INTEGER}, "required": ["kind"]}
                for kind in ("cat", "dog")
            },
        },
        ['{"kind": "cat"}', '{"kind": "dog", "n": 1}'],
        ['{"kind": "cow"}', "{}"],
    ),
    (
        {"$ref": "#/$defs/n", "$defs": {"n": {"type": "object", "properties": {"next": {"$ref": "#/$defs/n"}}}}},
        ["{}", '{"next": {"next": {}}}'],
        ['{"next": 1}'],
    ),
    (True, ["1", '{"a": []}'], ["x"]),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "valid", "invalid"), ENFORCED, ids=lambda value: json.dumps(value)[:60])
def test_what_the_grammar_lets_through_validates(compiler, schema, valid, invalid):
    grammar = compile_schema(compiler, schema)
    validator = jsonschema.Draft202012Validator(schema)
    for text in valid:
        assert accepts(grammar, text), text
        validator.validate(json.loads(text))
    for text in invalid:
        assert not accepts(grammar, text), text


REFUSED: list[tuple[Any, str]] = [
    ({"type": "number", "multipleOf": 0.5}, "multipleOf"),
    ({"type": "integer", "multipleOf": 3, "minimum": 4}, "multipleOf"),
    ({"type": "array", "items": INTEGER, "uniqueItems": True}, "uniqueItems"),
    ({"type": "array", "items": INTEGER, "contains": {"const": 5}}, "contains"),
    (A_OBJECT | {"propertyNames": {"pattern": "^x$"}}, "propertyNames"),
    (A_OBJECT | {"patternProperties": {"^x$": INTEGER}}, "patternProperties"),
    (A_OBJECT | {"additionalProperties": STRING}, "additionalProperties"),
    (A_OBJECT | {"dependentRequired": {"a": ["b"]}}, "dependentRequired"),
    (A_OBJECT | {"dependentSchemas": {"a": {"required": ["b"]}}}, "dependentSchemas"),
    (A_OBJECT | {"if": {"required": ["a"]}, "then": {"required": ["b"]}}, "if, then"),
    (A_OBJECT | {"required": ["b"]}, "requires b"),
    (A_OBJECT | {"anyOf": [{"required": ["a"]}]}, "beside anyOf"),
    ({"type": "object", "minProperties": 2}, "minProperties"),
    ({"type": "object", "minProperties": 2, "additionalProperties": INTEGER}, "minProperties"),
    ({"not": INTEGER}, "not"),
    ({"type": "string", "anyOf": [{"const": "x"}]}, "type beside anyOf"),
    ({"$ref": "#/$defs/a", "minimum": 5, "$defs": {"a": INTEGER}}, "minimum beside"),
    ({"$ref": "#/$defs/a"}, "not there"),
    ({"$ref": "http://x/y"}, "http://x/y"),
    ({"allOf": [{"type": "integer", "minimum": 3}, {"type": "integer", "maximum": 5}]}, "allOf"),
    ({"oneOf": [INTEGER, {"type": "number"}]}, "overlap"),
    ({"oneOf": [A_OBJECT, A_OBJECT | {"required": ["a"]}]}, "overlap"),
    ({"minimum": 3}, "minimum"),
    ({"pattern": "^a$"}, "pattern"),
    ({"required": ["a"]}, "required"),
    ({"type": "string", "pattern": "^a+$", "maxLength": 3}, "maxLength, pattern"),
    ({"type": "string", "format": "date", "maxLength": 3}, "format, maxLength"),
    ({"type": "string", "format": "iri"}, "iri"),
    ({"type": "string", "contentEncoding": "base64"}, "contentEncoding"),
    ({"type": "string", "pattern": '^a"b$'}, "escape"),
    ({"type": "string", "pattern": "^a\\nb$"}, "escape"),
    ({"type": "string", "pattern": "^(?=a)a$"}, "looks around"),
    ({"type": "string", "pattern": "x^a"}, "^"),
    ({"type": "integer", "enum": [1, "a"]}, "'a'"),
    ({"type": "integer", "enum": [1, 20], "minimum": 5}, "minimum beside enum"),
    ({"const": "x", "enum": ["y"]}, "beside"),
    ({"type": "nonsense"}, "nonsense"),
    ({"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}, "properties/a"),
    ({"type": "object", "properties": 3}, "properties"),
    ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
    ({"enum": []}, "enum"),
    (False, "false"),
]


@pytest.mark.parametrize(("schema", "named"), REFUSED, ids=lambda value: json.dumps(value)[:60])
def test_what_would_not_be_enforced_is_refused_by_name(compiler, schema, named):
    with pytest.raises(InvalidParamsError) as caught:
        compile_schema(compiler, schema)
    assert named in str(caught.value)
    assert caught.value.param.startswith("structured_outputs.json")


def test_a_schema_that_is_too_deep_or_too_long_is_refused_before_it_is_compiled(compiler):
    deep: dict[str, Any] = {}
    for _ in range(70):
        deep = {"type": "array", "items": deep}
    with pytest.raises(InvalidParamsError, match="deep") as caught:
        compile_schema(compiler, deep)
    assert caught.value.limit == 64
    with pytest.raises(InvalidParamsError, match="bytes") as caught:
        compile_schema(compiler, {"enum": ["x" * 70_000]})
    assert caught.value.limit == 65536


def test_the_compact_form_has_no_blanks(compiler):
    schema = {"type": "object", "properties": {"a": INTEGER, "b": {"type": "array", "items": INTEGER}}}
    grammar = compile_schema(compiler, schema, any_whitespace=False)
    assert accepts(grammar, '{"a":1,"b":[1,2]}')
    assert not accepts(grammar, '{"a": 1}')
    assert not accepts(grammar, '{"b":[1, 2]}')


def test_blanks_in_a_row_have_a_limit(compiler):
    grammar = compile_schema(compiler, A_OBJECT)
    assert accepts(grammar, "{" + " " * 20 + '"a":1}')
    assert not accepts(grammar, "{" + " " * 21 + '"a":1}')
