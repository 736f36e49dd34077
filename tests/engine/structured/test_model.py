"""The bundled model follows grammars: what it samples validates, on a CPU and through captured decode steps, whatever is beside."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from engine import LLM, Completion, SamplingParams
from engine.request import FinishReason
from engine.structured_outputs import StructuredOutputsParams

QUESTION = [{"role": "user", "content": "Tell me about Bob."}]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 1, "maximum": 120},
        "mood": {"enum": ["good", "bad", None]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 5}, "minItems": 1, "maxItems": 3},
        "home": {
            "type": "object",
            "properties": {"lat": {"type": "number", "minimum": -90, "maximum": 90}, "known": {"type": "boolean"}},
            "required": ["lat"],
        },
    },
    "required": ["name", "age", "mood", "tags", "home"],
}  # fmt: skip
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 9}, {"type": "null"}]},
                "left": {"$ref": "#/$defs/node"},
            },
            "required": ["value"],
        }
    },
}
SHAPES = {
    "type": "array",
    "maxItems": 3,
    "items": {
        "oneOf": [
            {"type": "object", "properties": {"kind": {"const": "dot"}, "x": {"type": "integer"}}, "required": ["kind", "x"]},
            {"type": "object", "properties": {"kind": {"const": "day"}, "on": {"type": "string", "format": "date"}}, "required": ["kind", "on"]},
        ]
    },
}  # fmt: skip


def _validates(schema: Any) -> Callable[[str], None]:
    return lambda text: jsonschema.validate(json.loads(text), schema)


def _matches(pattern: str) -> Callable[[str], None]:
    def check(text: str) -> None:
        assert re.fullmatch(pattern, text), text

    return check


KINDS: list[tuple[dict[str, Any], Callable[[str], None]]] = [
    ({"json": PERSON}, _validates(PERSON)),
    ({"json": PERSON, "any_whitespace": False}, _validates(PERSON)),
    ({"json": TREE}, _validates(TREE)),
    ({"json": SHAPES}, _validates(SHAPES)),
    ({"json_object": True}, _validates({"type": "object"})),
    ({"regex": "(\\+49|0)[1-9]\\d{2,4}/\\d{3,8}"}, _matches("(\\+49|0)[1-9][0-9]{2,4}/[0-9]{3,8}")),
    ({"choice": ("yes", "no", "maybe 😀", 'a "quoted" one')}, _matches('yes|no|maybe 😀|a "quoted" one')),
    ({"grammar": 'root ::= sum\nsum ::= num (" + " num)*\nnum ::= [0-9] [0-9]?'}, _matches("\\d{1,2}( \\+ \\d{1,2})*")),
]  # fmt: skip


def sampled(llm: LLM, tries: int, max_tokens: int = 160) -> list[tuple[Callable[[str], None], Completion]]:
    """So many tries at temperature 1.5, the kinds in turn."""
    checks = [KINDS[i % len(KINDS)] for i in range(tries)]
    params = [
        SamplingParams(
            max_tokens=max_tokens, temperature=1.5, seed=i, structured_outputs=StructuredOutputsParams(**kind)
        )
        for i, (kind, _) in enumerate(checks)
    ]
    found = llm.chat([QUESTION] * tries, params, use_tqdm=False)
    return list(zip((check for _, check in checks), found, strict=True))


def assert_all_valid(found: list[tuple[Callable[[str], None], Completion]]) -> Counter[str]:
    """What ended by itself is valid, and what did not was cut by its length."""
    for check, completion in found:
        if completion.finish_reason is FinishReason.STOP:
            check(completion.text)
        else:
            assert completion.finish_reason is FinishReason.LENGTH, completion.error
            assert completion.num_output_tokens == 160
    return Counter(completion.finish_reason.value for _, completion in found)


def test_what_ends_by_itself_is_valid(bundled: Path):
    with LLM(bundled, num_blocks=2000, max_num_seqs=32, num_threads=1) as llm:
        ends = assert_all_valid(sampled(llm, 64))
        assert ends["stop"] >= 32, ends


@pytest.mark.full
def test_a_thousand_of_a_thousand_that_end_by_themselves_are_valid(bundled: Path):
    with LLM(bundled, num_blocks=4000, max_num_seqs=64) as llm:
        tries, ended = 0, 0
        while ended < 1000:
            found = sampled(llm, 400)
            tries += 400
            ended += assert_all_valid(found)["stop"]
            assert tries <= 4000, f"{ended} of {tries} ended by themselves"
