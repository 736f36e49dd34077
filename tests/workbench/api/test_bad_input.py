"""Every kind of bad input is refused before any work, with a status, a code, the parameter, the value and a way out."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "x"}

FORMAT = "response_format.json_schema"
CLOSED = {"type": "object", "additionalProperties": False}


def json_schema(schema: dict[str, Any]) -> dict[str, Any]:
    return {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "s", "strict": True, "schema": schema},
        }
    }


def tool(**more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **more}}


TOOLS = [tool()]
CASES = [
    (CHAT, {"model": "gpt-9"}, 404, "model_not_found", "model", ["gpt-9", "fake-echo"]),
    (CHAT, {"temprature": 1}, 400, "unsupported_field", "temprature", ["temprature", "temperature"]),
    (CHAT, {"zzz": 1}, 400, "unsupported_field", "zzz", ["zzz", "messages"]),
    (CHAT, {"temperature": -1}, 400, "invalid_params", "temperature", ["-1", "at least 0"]),
    (CHAT, {"temperature": "hot"}, 400, "invalid_request", "temperature", ["hot", "number"]),
    (CHAT, {"temperature": True}, 400, "invalid_request", "temperature", ["True"]),
    (CHAT, {"top_p": 0}, 400, "invalid_params", "top_p", ["above 0"]),
    (CHAT, {"top_k": -3}, 400, "invalid_params", "top_k", ["-3"]),
    (CHAT, {"min_p": 2}, 400, "invalid_params", "min_p", ["2"]),
    (CHAT, {"max_tokens": 0}, 400, "invalid_params", "max_tokens", ["0", "at least 1"]),
    (CHAT, {"max_tokens": 3, "max_completion_tokens": 4}, 400, "invalid_request", "max_completion_tokens", ["3", "4"]),
    (CHAT, {"min_tokens": 9, "max_tokens": 3}, 400, "invalid_params", "min_tokens", ["9", "3"]),
    (CHAT, {"seed": 2**70}, 400, "invalid_params", "seed", [str(2**70)]),
    (CHAT, {"stop": ["a"] * 17}, 400, "invalid_params", "stop", ["16"]),
    (CHAT, {"stop": 5}, 400, "invalid_request", "stop", ["5"]),
    (CHAT, {"stop_token_ids": ["a"]}, 400, "invalid_request", "stop_token_ids.0", ["a"]),
    (CHAT, {"n": 17}, 400, "invalid_request", "n", ["17", "16"]),
    (CHAT, {"top_logprobs": 2}, 400, "invalid_request", "top_logprobs", ["logprobs=true"]),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, 400, "invalid_request", "top_logprobs", ["21", "20"]),
    (CHAT, {"stream_options": {"include_usage": True}}, 400, "invalid_request", "stream_options", ["stream=true"]),
    (CHAT, {"presence_penalty": 2.5}, 400, "invalid_params", "presence_penalty", ["2.5", "at most 2"]),
    (CHAT, {"frequency_penalty": -3}, 400, "invalid_params", "frequency_penalty", ["-3", "at least -2"]),
    (CHAT, {"repetition_penalty": 0}, 400, "invalid_params", "repetition_penalty", ["0", "above 0"]),
    (CHAT, {"logit_bias": {"5": 101}}, 400, "invalid_params", "logit_bias", ["101", "at most 100"]),
    (CHAT, {"logit_bias": {"cat": 1}}, 400, "invalid_params", "logit_bias", ["cat", "integer"]),
    (CHAT, {"logit_bias": {"99999": 1}}, 400, "invalid_request", "logit_bias", ["99999", "vocabulary"]),
    (CHAT, {"bad_words": [" "]}, 400, "invalid_params", "bad_words", ["empty"]),
    (CHAT, {"bad_words": ["x" * 17]}, 400, "invalid_params", "bad_words", ["17", "16 tokens"]),
    (CHAT, {"allowed_token_ids": []}, 400, "invalid_params", "allowed_token_ids", ["empty"]),
    (CHAT, {"allowed_token_ids": [-1]}, 400, "invalid_request", "allowed_token_ids", ["-1", "vocabulary"]),
    (CHAT, {"response_format": {"type": "json"}}, 400, "invalid_request", "response_format.type", ["json_schema"]),
    (CHAT, {"response_format": {"type": "json_schema"}}, 400, "invalid_request", f"{FORMAT}.schema", ["no schema"]),
    (
        CHAT, {"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}},
        400, "invalid_request", f"{FORMAT}.name", ["a b"],
    ),
    (CHAT, json_schema({}), 400, "invalid_request", f"{FORMAT}.schema", ["object at its root"]),
    (CHAT, json_schema({"type": "object", "properties": {}}), 400, "invalid_request", f"{FORMAT}.schema", ["additionalProperties"]),
    (
        CHAT, json_schema({**CLOSED, "properties": {"a": {"items": {**CLOSED, "properties": {"b": {}, "c": {}}, "required": ["c"]}}}, "required": ["a"]}),
        400, "invalid_request", f"{FORMAT}.schema.properties.a.items", ["without b"],
    ),
    (
        CHAT, json_schema({**CLOSED, "properties": {}, "$defs": {"D": {"anyOf": [{"type": "object"}]}}}),
        400, "invalid_request", f"{FORMAT}.schema.$defs.D.anyOf.0", ["additionalProperties"],
    ),
    (
        CHAT, json_schema({"type": "object", "additionalProperties": {"type": "object"}}),
        400, "invalid_request", f"{FORMAT}.schema.additionalProperties", ["additionalProperties"],
    ),
    (CHAT, {"guided_json": "{", "max_tokens": 1}, 400, "invalid_params", "guided_json", ["JSON schema"]),
    (CHAT, {"guided_choice": []}, 400, "invalid_params", "guided_choice", ["empty"]),
    (TEXT, {"prompt": "a", "guided_regex": ""}, 400, "invalid_params", "guided_regex", ["empty"]),
    (TEXT, {"prompt": "a", "structured_outputs": {"xml": 1}}, 400, "invalid_params", "structured_outputs", ["xml"]),
    (CHAT, {"guided_regex": "a", "guided_choice": ["a"]}, 400, "invalid_request", "guided_choice", ["guided_regex and"]),
    (CHAT, {"response_format": {"type": "json_object"}, "tools": TOOLS}, 400, "invalid_request", "response_format", ["tools"]),
    (CHAT, {"chat_template_kwargs": {"tokenize": True}}, 400, "invalid_request", "chat_template_kwargs.tokenize", ["tokenize"]),
    (CHAT, {"tools": TOOLS}, 400, "unsupported_field", "tools", ["known format"]),
    (CHAT, {"tool_choice": "required"}, 400, "invalid_request", "tool_choice", ["required", "needs tools"]),
    (CHAT, {"tools": TOOLS, "tool_choice": "some"}, 400, "invalid_request", "tool_choice", ["some"]),
    (
        CHAT, {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}},
        400, "invalid_request", "tool_choice.function.name", ["'g'"],
    ),
    (
        CHAT, {"tools": TOOLS, "tool_choice": {"type": "function"}},
        400, "invalid_request", "tool_choice.function", ["missing"],
    ),
    (
        CHAT, json_schema({**CLOSED, "properties": {"a": {}}, "required": 7}),
        400, "invalid_request", f"{FORMAT}.schema", ["without a"],
    ),
    (CHAT, {"tools": TOOLS * 2}, 400, "invalid_request", "tools.1.function.name", ["two tools", "'f'"]),
    (
        CHAT, {"tools": [tool(strict=True, parameters=CLOSED)]},
        400, "unsupported_field", "tools.0.function.strict", ["strict", "required"],
    ),
    (
        CHAT, {"tools": [tool(strict=True)], "tool_choice": "required"},
        400, "invalid_request", "tools.0.function.parameters", ["additionalProperties"],
    ),
    (
        CHAT, {"tools": [tool(parameters={"properties": {"a": {"$ref": "#"}}})], "tool_choice": "required"},
        400, "unsupported_field", "tools.0.function.parameters.properties.a", ["'#'", "$defs"],
    ),
    (CHAT, {"messages": []}, 400, "invalid_request", "messages", ["at least 1"]),
    (CHAT, {"messages": "hi"}, 400, "invalid_request", "messages", ["hi"]),
    (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, 400, "invalid_request", "messages.0.role", ["robot"]),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "invalid_request", "messages", ["no content"]),
    (CHAT, {"messages": [{**USER, "mood": 1}]}, 400, "unsupported_field", "messages.0.mood", ["mood"]),
    (
        CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        400, "invalid_request", "messages.0.content.0.type", ["image_url"],
    ),
    (CHAT, {"messages": [{**USER, "content": "y" * 3000}]}, 400, "context_length_exceeded", "prompt", ["3003", "2047"]),
    (TEXT, {}, 400, "invalid_request", "prompt", ["missing"]),
    (TEXT, {"prompt": []}, 400, "invalid_request", "prompt", ["empty"]),
    (TEXT, {"prompt": ""}, 400, "invalid_request", "prompt", ["no tokens"]),
    (TEXT, {"prompt": [99999]}, 400, "invalid_request", "prompt", ["99999"]),
    (TEXT, {"prompt": ["a"] * 300}, 400, "invalid_request", "prompt", ["300", "256"]),
    (CHAT, {"typical_p": 0}, 400, "invalid_params", "typical_p", ["0", "above 0", "at most 1"]),
    (CHAT, {"typical_p": 1.5}, 400, "invalid_params", "typical_p", ["1.5", "at most 1"]),
    (CHAT, {"best_of": 3}, 400, "unsupported_field", "best_of", ["3", "/v1/completions"]),
    (CHAT, {"echo": True}, 400, "unsupported_field", "echo", ["True", "/v1/completions"]),
    (CHAT, {"prompt_logprobs": 21}, 400, "invalid_request", "prompt_logprobs", ["21", "20"]),
    (CHAT, {"prompt_logprobs": -1}, 400, "invalid_request", "prompt_logprobs", ["-1", "between 0 and 20"]),
    (CHAT, {"prompt_logprobs": True}, 400, "invalid_request", "prompt_logprobs", ["True"]),
    (CHAT, {"prompt_logprobs": 1, "stream": True}, 400, "invalid_request", "prompt_logprobs", ["1", "stream=false"]),
    (TEXT, {"prompt": "a", "max_tokens": 0}, 400, "invalid_params", "max_tokens", ["0", "at least 1"]),
    (TEXT, {"prompt": "a", "echo": True, "logprobs": 21}, 400, "invalid_params", "logprobs", ["21", "20"]),
    (TEXT, {"prompt": "a", "best_of": 17}, 400, "invalid_params", "best_of", ["17", "16"]),
    (TEXT, {"prompt": "a", "best_of": 2, "n": 3}, 400, "invalid_params", "best_of", ["2", "between 3 and 16"]),
    (TEXT, {"prompt": "a", "best_of": 3, "stream": True}, 400, "invalid_request", "best_of", ["3", "stream=false"]),
    (TEXT, {"prompt": "a", "messages": []}, 400, "unsupported_field", "messages", ["messages"]),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "status", "code", "param", "words"), CASES)
def test_bad_values_are_refused_by_name(
    server: Any, path: str, body: dict[str, Any], status: int, code: str, param: str, words: list[str]
) -> None:
    before = server.worker.stats().steps
    response = server.http.post(
        path,
        content=json.dumps({"model": server.model, **({"messages": [USER]} if path == CHAT else {}), **body}),
        headers={"content-type": "application/json"},
    )
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, param), error
    assert error["type"] == "invalid_request_error"
    assert all(word in error["message"] for word in words), error["message"]
    assert server.worker.stats().steps == before


@pytest.mark.parametrize(
    ("content", "media_type", "status", "word"),
    [
        (b"{bad", "application/json", 400, "line 1 column 2"),
        (b"", "application/json", 400, "not valid JSON"),
        (b"[1]", "application/json", 400, "list"),
        (b"\xff\xfe{", "application/json", 400, "UTF-8"),
        (b"[" * 100_000, "application/json", 400, "deep"),
        (b"{}", "text/plain", 415, "text/plain"),
        (b"{}", "application/x-www-form-urlencoded", 415, "application/json"),
    ],
)
def test_bodies_that_are_no_json_are_refused(
    server: Any, content: bytes, media_type: str, status: int, word: str
) -> None:
    response = server.http.post(CHAT, content=content, headers={"content-type": media_type})
    assert response.status_code == status
    assert word in response.json()["error"]["message"]


def test_a_body_over_the_limit_is_refused_declared_or_not(serve: Any) -> None:
    from workbench.host import fake_worker

    def chunks() -> Any:
        for _ in range(40):
            yield b" " * 100

    with serve(fake_worker, max_body_bytes=2048) as server:
        declared = server.http.post(CHAT, content=b" " * 4000, headers={"content-type": "application/json"})
        chunked = server.http.post(CHAT, content=chunks(), headers={"content-type": "application/json"})
    for response in (declared, chunked):
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "body_too_large"
        assert "2048" in response.json()["error"]["message"]


@pytest.mark.parametrize(("method", "path", "status"), [
    ("GET", "/v1", 404), ("GET", "/v1/", 404), ("POST", "/v1/batches", 404), ("GET", "/v1/models/other", 404),
    ("GET", CHAT, 405), ("DELETE", "/v1/models", 405),
])  # fmt: skip
def test_unknown_paths_and_methods_answer_in_openais_shape(
    server: Any, method: str, path: str, status: int
) -> None:
    response = server.http.request(method, path)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_the_official_client_raises_its_own_types(server: Any) -> None:
    ask = server.openai.chat.completions.create
    with pytest.raises(openai.NotFoundError, match="gpt-9"):
        ask(model="gpt-9", messages=[USER])
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        ask(model=server.model, messages=[USER], temperature=-0.5)
    assert caught.value.param == "temperature"


def test_a_refused_choice_leaves_no_other_running(server: Any, eventually: Any) -> None:
    response = server.post(TEXT, prompt=[[97], [99999]], max_tokens=500)
    assert response.status_code == 400
    assert eventually(lambda: server.worker.stats().num_running == 0)
    assert server.worker.stats().num_free_blocks == server.worker.stats().num_blocks


@pytest.mark.parametrize(("headers", "param"), [
    ({"host": "evil.example"}, "host"),
    ({"host": "127.0.0.1.evil.example"}, "host"),
    ({"host": ""}, "host"),
    ({"origin": "https://evil.example"}, "origin"),
    ({"origin": "null"}, "origin"),
    ({"origin": "http://127.0.0.1:1"}, "origin"),
])  # fmt: skip
def test_other_sites_are_kept_out(server: Any, headers: dict[str, str], param: str) -> None:
    response = server.http.post(CHAT, json={"messages": [USER], "max_tokens": 1}, headers=headers)
    assert response.status_code == 403
    assert response.json()["error"]["param"] == param
    assert "access-control-allow-origin" not in response.headers


def test_the_server_itself_is_an_accepted_origin(server: Any) -> None:
    for name in (server.url, server.url.replace("127.0.0.1", "localhost")):
        response = server.http.get(
            "/v1/models", headers={"origin": name, "host": name.removeprefix("http://")}
        )
        assert response.status_code == 200
