"""/tokenize and /detokenize in vLLM's forms, over the fake tokenizer and over a real one."""

from __future__ import annotations

from typing import Any

import pytest

MESSAGES = [{"role": "user", "content": "Grüße"}]


def test_a_prompts_tokens_are_told_and_turned_back(server: Any) -> None:
    found = server.http.post("/tokenize", json={"model": server.model, "prompt": "Grüße<|end|>"})
    assert found.headers["x-request-id"]
    body = found.json()
    tokens = [*"Grüße".encode(), 256]
    assert body == {"count": len(tokens), "max_model_len": 2048, "tokens": tokens, "token_strs": None}
    assert body["max_model_len"] == server.openai.models.list().data[0].max_model_len
    back = server.http.post("/detokenize", json={"tokens": body["tokens"]}).json()
    assert back == {"prompt": "Grüße<|end|>"}
    named = server.http.post("/tokenize", json={"prompt": "ab<|end|>", "return_token_strs": True}).json()
    assert named["token_strs"] == ["a", "b", "<|end|>"]


def test_messages_count_as_their_answer_counts_them(server: Any) -> None:
    counted = server.http.post("/tokenize", json={"messages": MESSAGES}).json()["count"]
    answer = server.openai.chat.completions.create(model=server.model, messages=MESSAGES, max_tokens=1)
    assert counted == answer.usage.prompt_tokens
    open_end = server.http.post(
        "/tokenize", json={"messages": MESSAGES, "add_generation_prompt": False}
    ).json()
    assert open_end["count"] == counted - 1
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert (
        server.http.post("/tokenize", json={"messages": MESSAGES, "tools": tools}).json()["count"] > counted
    )


@pytest.mark.full
def test_a_real_tokenizer_adds_what_its_model_expects(real_server: Any) -> None:
    tokenizer = real_server.worker.tokenizer
    for special in (True, False):
        body = {"prompt": "the cat reads", "add_special_tokens": special, "return_token_strs": True}
        found = real_server.http.post("/tokenize", json=body).json()
        assert found["tokens"] == tokenizer.encode("the cat reads", special)
        assert "".join(found["token_strs"]) == "the cat reads"
        assert real_server.http.post("/detokenize", json={"tokens": found["tokens"]}).json()["prompt"] == (
            "the cat reads"
        )


@pytest.mark.parametrize(("path", "body", "status", "param", "word"), [
    ("/tokenize", {}, 400, "prompt", "needed"),
    ("/tokenize", {"prompt": "a", "messages": MESSAGES}, 400, "prompt", "not both"),
    ("/tokenize", {"prompt": "a", "tools": []}, 400, "tools", "needs messages"),
    ("/tokenize", {"messages": MESSAGES, "add_special_tokens": True}, 400, "add_special_tokens", "template"),
    ("/tokenize", {"promt": "a"}, 400, "promt", "'prompt'"),
    ("/tokenize", {"prompt": "a", "model": "gpt-9"}, 404, "model", "gpt-9"),
    ("/detokenize", {"tokens": [1, 99999]}, 400, "tokens.1", "99999"),
    ("/detokenize", {"tokens": [-1]}, 400, "tokens.0", "-1"),
    ("/detokenize", {"tokens": "abc"}, 400, "tokens", "abc"),
])  # fmt: skip
def test_bad_bodies_are_refused_by_name(
    server: Any, path: str, body: dict[str, Any], status: int, param: str, word: str
) -> None:
    answer = server.http.post(path, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error
    assert word in error["message"], error


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize", "/rerank", "/v2/rerank"])
def test_paths_beside_v1_answer_in_openais_shape(server: Any, path: str) -> None:
    refused = server.http.get(path)
    assert (refused.status_code, refused.json()["error"]["code"]) == (405, "method_not_allowed")
    assert server.http.post(path, content=b"{").json()["error"]["code"] == "unsupported_media_type"
