"""What an output must look like reaches the engine, from every field that says so."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import BaseModel

from engine.sampling_params import SamplingParams
from engine.structured_outputs import StructuredOutputsParams
from workbench.backends.openai import OpenAIBackend


class City(BaseModel):
    name: str
    people: int


def test_the_client_parses_a_pydantic_model(script: Any) -> None:
    script.says('{"name": "Ulm", "people": 128928}')
    answer = script.server.openai.chat.completions.parse(
        model=script.server.model, messages=[{"role": "user", "content": "?"}], response_format=City
    )
    assert answer.choices[0].message.parsed == City(name="Ulm", people=128928)
    asked = script.last_params().structured_outputs
    assert list(json.loads(asked.json)["properties"]) == ["name", "people"]


def test_a_stream_cut_by_length_says_so(script: Any) -> None:
    script.says('{"name": "Ulm"}')
    chunks = list(script.ask(response_format={"type": "json_object"}, max_tokens=5, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == '{"nam'
    assert chunks[-1].choices[0].finish_reason == "length"
    assert script.last_params().structured_outputs == StructuredOutputsParams(json_object=True)


def test_a_strict_schema_may_leave_names_open_whose_values_it_describes(script: Any) -> None:
    """As MLflow's judges ask for a dict."""
    script.says('{"ok": true}')
    schema = {"type": "object", "additionalProperties": {"type": "boolean"}}
    named = {"name": "s", "strict": True, "schema": schema}
    answer = script.ask(response_format={"type": "json_schema", "json_schema": named})
    assert answer.choices[0].message.content == '{"ok": true}'
    assert json.loads(script.last_params().structured_outputs.json) == schema


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize(
    ("body", "asked"),
    [
        ({"structured_outputs": {"choice": ["a", "b"]}}, {"choice": ("a", "b")}),
        ({"structured_outputs": {"regex": "a+", "json": None}}, {"regex": "a+"}),
        ({"structured_outputs": {"json": {}, "disable_any_whitespace": True}}, {"json": "{}", "any_whitespace": False}),
        ({"guided_json": {"type": "string"}}, {"json": '{"type":"string"}'}),
        ({"guided_regex": "a|b"}, {"regex": "a|b"}),
        ({"guided_choice": ["a"]}, {"choice": ("a",)}),
        ({"guided_grammar": 'root ::= "a"'}, {"grammar": 'root ::= "a"'}),
        ({"response_format": {"type": "text"}}, None),
    ],
)  # fmt: skip
def test_vllms_fields_are_the_same(
    script: Any, path: str, body: dict[str, Any], asked: dict[str, Any] | None
) -> None:
    script.says('"a"' if "json" in str(body) else "a")
    prompt = {"prompt": "x"} if path == "/v1/completions" else {}
    response = script.server.post(path, max_tokens=5, **prompt, **body)
    assert response.status_code == 200, response.text
    wanted = StructuredOutputsParams(**asked) if asked is not None else None
    assert script.last_params().structured_outputs == wanted


@pytest.mark.parametrize(
    "asked",
    [
        StructuredOutputsParams(json={"type": "object"}, any_whitespace=False),
        StructuredOutputsParams(choice=("{}", "b")),
        StructuredOutputsParams(json_object=True),
    ],
)
def test_our_own_client_of_other_servers_says_it_in_vllms_names(
    script: Any, asked: StructuredOutputsParams
) -> None:
    script.says("{}")
    with OpenAIBackend(script.server.url) as backend:
        [done] = backend.chat(
            [{"role": "user", "content": "?"}], SamplingParams(max_tokens=9, structured_outputs=asked)
        )
    assert done.text == "{}"
    assert script.last_params().structured_outputs == asked
