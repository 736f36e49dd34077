"""Chat completions through the official client, over a runner whose answer is known."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from workbench.host import FAKE_ANSWER, fake_worker

USER = [{"role": "user", "content": "Hello"}]


def test_whole_answer_has_text_finish_reason_and_usage(server: Any) -> None:
    answer = server.openai.chat.completions.create(model=server.model, messages=USER)
    choice = answer.choices[0]
    assert (choice.message.content, choice.finish_reason) == (FAKE_ANSWER, "stop")
    assert choice.message.role == "assistant"
    assert answer.object == "chat.completion"
    prompt = server.worker.tokenizer.apply_chat_template(USER)
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == len(FAKE_ANSWER) + 1  # and the end-of-sequence token
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_the_async_client_reads_whole_answers_and_streams_side_by_side(server: Any) -> None:
    async def whole(client: AsyncOpenAI) -> str | None:
        answer = await client.chat.completions.create(model=server.model, messages=USER)
        return answer.choices[0].message.content

    async def streamed(client: AsyncOpenAI) -> str:
        stream = await client.chat.completions.create(model=server.model, messages=USER, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def talk() -> list[str | None]:
        plain = DefaultAsyncHttpxClient(verify=False)
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", http_client=plain) as client:
            return await asyncio.gather(*(ask(client) for ask in (whole, streamed) * 4))

    assert asyncio.run(talk()) == [FAKE_ANSWER] * 8


def test_each_chunk_tells_the_usage_so_far_where_that_is_asked_for(server: Any) -> None:
    """vLLM's continuous_usage_stats; guidellm sends it."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(
        server.openai.chat.completions.create(
            model=server.model, messages=USER, stream=True, max_tokens=5, stream_options=options
        )
    )
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == chunks[-2].usage.completion_tokens == 5
    assert {chunk.usage.prompt_tokens for chunk in chunks} == {chunks[-1].usage.prompt_tokens}
    assert [bool(chunk.choices) for chunk in chunks] == [True] * (len(chunks) - 1) + [False]


def test_stream_says_the_same_with_role_first_and_usage_last(server: Any) -> None:
    chunks = list(
        server.openai.chat.completions.create(
            model=server.model, messages=USER, stream=True, stream_options={"include_usage": True}
        )
    )
    *said, last = chunks
    assert "".join(c.choices[0].delta.content or "" for c in said) == FAKE_ANSWER
    assert [c.choices[0].delta.role for c in said if c.choices[0].delta.role] == ["assistant"]
    assert said[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in said if c.choices[0].finish_reason] == ["stop"]
    assert last.choices == []
    assert last.usage.completion_tokens == len(FAKE_ANSWER) + 1
    assert {c.id for c in chunks} == {chunks[0].id}
    assert all(c.usage is None for c in said)


def test_stream_without_usage_sends_no_usage_and_ends_with_done(server: Any) -> None:
    response = server.post(stream=True, max_tokens=3)
    events = [line for line in response.text.split("\n\n") if line]
    assert response.headers["content-type"].startswith("text/event-stream")
    assert events[-1] == "data: [DONE]"
    assert all("usage" not in json.loads(event[len("data: ") :]) for event in events[:-1])


def test_cached_tokens_are_the_full_blocks_of_a_repeated_prompt(server: Any) -> None:
    messages = [
        {"role": "user", "content": "A prompt of its own that is long enough for several blocks. " * 3}
    ]
    ask = partial(server.openai.chat.completions.create, model=server.model, messages=messages, max_tokens=2)
    first, second = ask(), ask()
    full_blocks = (first.usage.prompt_tokens - 1) // 16  # at least one token is computed
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens == 16 * full_blocks > 16


def test_cache_salt_keeps_callers_apart(server: Any) -> None:
    messages = [
        {"role": "user", "content": "Another prompt that fills some blocks, asked under two salts. " * 2}
    ]
    ask = partial(server.openai.chat.completions.create, model=server.model, messages=messages, max_tokens=2)
    ask(extra_body={"cache_salt": "a"})
    assert ask(extra_body={"cache_salt": "b"}).usage.prompt_tokens_details.cached_tokens == 0
    assert ask(extra_body={"cache_salt": "a"}).usage.prompt_tokens_details.cached_tokens > 0


def test_logprobs_name_each_token_and_its_alternatives(server: Any) -> None:
    answer = server.openai.chat.completions.create(
        model=server.model, messages=USER, max_tokens=4, logprobs=True, top_logprobs=3
    )
    entries = answer.choices[0].logprobs.content
    assert "".join(e.token for e in entries) == FAKE_ANSWER[:4]
    assert all(bytes(e.bytes).decode() == e.token and len(e.top_logprobs) == 3 for e in entries)
    assert all(
        e.top_logprobs[0].token == e.token and e.logprob == e.top_logprobs[0].logprob < 0 for e in entries
    )
    streamed = server.openai.chat.completions.create(
        model=server.model, messages=USER, max_tokens=4, logprobs=True, top_logprobs=3, stream=True
    )
    assert [e for chunk in streamed for e in chunk.choices[0].logprobs.content] == entries


def test_no_logprobs_unless_asked_for(server: Any) -> None:
    answer = server.openai.chat.completions.create(model=server.model, messages=USER, max_tokens=2)
    assert answer.choices[0].logprobs is None


@pytest.mark.parametrize("stream", [False, True])
def test_stop_text_ends_the_answer_and_is_not_part_of_it(server: Any, stream: bool) -> None:
    ask = partial(
        server.openai.chat.completions.create, model=server.model, messages=USER, stop=["runner", "zzz"]
    )
    if stream:
        chunks = list(ask(stream=True))
        text = "".join(c.choices[0].delta.content or "" for c in chunks)
        end = chunks[-1].choices[0]
    else:
        end = ask().choices[0]
        text = end.message.content
    assert text == FAKE_ANSWER[: FAKE_ANSWER.index("runner")]
    assert (end.finish_reason, end.stop_reason) == ("stop", "runner")


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_token_limit_ends_with_length(server: Any, field: str) -> None:
    answer = server.openai.chat.completions.create(model=server.model, messages=USER, **{field: 5})
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (FAKE_ANSWER[:5], "length")


def test_vllm_extras_reach_the_engine(server: Any) -> None:
    ask = partial(server.openai.chat.completions.create, model=server.model, messages=USER)
    stopped = ask(extra_body={"stop_token_ids": [ord("a")], "min_p": 0.1, "top_k": 5})
    assert stopped.choices[0].message.content == FAKE_ANSWER[: FAKE_ANSWER.index("a")]
    assert stopped.choices[0].stop_reason == ord("a")
    longer = ask(max_tokens=400, extra_body={"ignore_eos": True})
    assert (longer.usage.completion_tokens, longer.choices[0].finish_reason) == (400, "length")
    late = ask(max_tokens=40, extra_body={"stop_token_ids": [ord("a")], "min_tokens": 30})
    assert len(late.choices[0].message.content) >= 29


def test_several_choices_come_whole_and_streamed(server: Any) -> None:
    ask = partial(server.openai.chat.completions.create, model=server.model, messages=USER, n=3, max_tokens=6)
    answer = ask()
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert {c.message.content for c in answer.choices} == {FAKE_ANSWER[:6]}
    assert answer.usage.completion_tokens == 18
    assert answer.usage.prompt_tokens == len(server.worker.tokenizer.apply_chat_template(USER))
    texts = {0: "", 1: "", 2: ""}
    for chunk in ask(stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert set(texts.values()) == {FAKE_ANSWER[:6]}


def test_request_id_is_taken_from_the_header_and_given_back(server: Any, eventually: Any) -> None:
    given = server.http.post(
        "/v1/chat/completions", json={"messages": USER, "max_tokens": 1}, headers={"x-request-id": "my-id.1"}
    )
    assert given.headers["x-request-id"] == "my-id.1"
    assert given.json()["id"] == "chatcmpl-my-id.1"
    # A record follows the last token, which the client may see first.
    assert eventually(lambda: any(r.request_id == "my-id.1" for r in server.worker.records.requests()))
    made = server.post(max_tokens=1, stream=True)
    assert len(made.headers["x-request-id"]) == 32
    refused = server.http.post("/v1/chat/completions", json={"bad": 1}, headers={"x-request-id": "my-id.2"})
    assert (refused.status_code, refused.headers["x-request-id"]) == (400, "my-id.2")


def test_content_parts_and_developer_role_are_read_as_text(server: Any) -> None:
    parts = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
    ]
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one\ntwo"}]
    answer = server.openai.chat.completions.create(model=server.model, messages=parts, max_tokens=1)
    assert answer.usage.prompt_tokens == len(server.worker.tokenizer.apply_chat_template(plain))


def test_neutral_values_of_openai_fields_are_accepted(server: Any) -> None:
    answer = server.openai.chat.completions.create(
        model=server.model, messages=USER, max_tokens=1, presence_penalty=0, frequency_penalty=0.0, user="me",
        response_format={"type": "text"}, service_tier="auto", store=False, metadata={"a": "b"}, temperature=None,
    )  # fmt: skip
    assert answer.choices[0].message.content == FAKE_ANSWER[:1]


def test_long_prompt_is_tokenized_beside_the_loop_and_answered(serve: Callable[..., Any]) -> None:
    with serve(partial(fake_worker, delay_s=0.0, num_blocks=4096, max_model_len=60_000)) as server:
        answer = server.openai.chat.completions.create(
            model=server.model, messages=[{"role": "user", "content": "x" * 40_000}], max_tokens=2
        )
    assert answer.usage.prompt_tokens > 40_000


def test_a_tool_conversation_reaches_the_template(server: Any) -> None:
    messages = [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    answer = server.openai.chat.completions.create(model=server.model, messages=messages, max_tokens=1)
    assert answer.choices[0].message.content == FAKE_ANSWER[:1]
