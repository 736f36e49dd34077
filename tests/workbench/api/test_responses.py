"""/v1/responses through the official client, sync and async: items, events, parsing, conversations; what is not served is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from openai import AsyncOpenAI, BadRequestError, DefaultAsyncHttpxClient
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from workbench.host import fake_worker

TEMPLATE = "{# <think></think> <tool_call> #}"
THOUGHTS = "Hm.\n1 + 1?"
WEATHER = {
    "type": "function", "name": "weather", "strict": True,
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
                   "additionalProperties": False},
}  # fmt: skip
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}</tool_call>'


class Point(BaseModel):
    x: int


def ask(script: Any, **body: Any) -> Any:
    return script.server.openai.responses.create(**{"model": script.server.model, "input": "Hello", **body})


def checked(events: Iterator[Any]) -> list[Any]:
    """A stream's events: numbered without a gap, of the official types, each item begun, grown and ended in order."""
    told = list(events)
    kinds = TypeAdapter(ResponseStreamEvent)
    assert [event.sequence_number for event in told] == list(range(len(told)))
    assert [event.type for event in told[:2]] == ["response.created", "response.in_progress"]
    grown: dict[int, str] = {}
    for event in told:
        kinds.validate_python(event.to_dict(mode="json"))
        match event.type:
            case "response.output_item.added":
                assert event.output_index == len(grown)
                assert event.item.status == "in_progress"
                grown[event.output_index] = ""
            case kind if kind.endswith(".delta"):
                assert event.output_index == len(grown) - 1
                grown[event.output_index] += event.delta
            case kind if kind.endswith("_text.done"):
                assert event.text == grown[event.output_index]
            case "response.function_call_arguments.done":
                assert event.arguments == grown[event.output_index]
            case "response.output_item.done":
                assert told[-1].response.output[event.output_index] == event.item
    assert len(told[-1].response.output) == len(grown)
    return told


def test_text_comes_whole_and_as_events(script: Any) -> None:
    script.says("Grüße aus 北京!")
    whole = ask(script, max_output_tokens=64, metadata={"a": "b"}, instructions="Be brief.")
    Response.model_validate(whole.to_dict(mode="json"))
    assert (whole.output_text, whole.status, whole.error, whole.incomplete_details) == (
        "Grüße aus 北京!", "completed", None, None,
    )  # fmt: skip
    assert (whole.metadata, whole.max_output_tokens, whole.store) == ({"a": "b"}, 64, False)
    written = "<|system|>Be brief.<|end|><|user|>Hello<|end|><|assistant|>"
    assert whole.usage.input_tokens == len(script.tokenizer.encode(written))
    assert whole.usage.output_tokens == len("Grüße aus 北京!".encode()) + 1
    events = checked(ask(script, max_output_tokens=64, stream=True, instructions="Be brief."))
    assert events[-1].type == "response.completed"
    last = events[-1].response
    assert (last.output_text, last.usage.output_tokens) == (whole.output_text, whole.usage.output_tokens)
    assert len([event for event in events if event.type == "response.output_text.delta"]) > 5


def test_an_answer_that_is_cut_is_incomplete(script: Any) -> None:
    script.says("A long answer")
    whole = ask(script, max_output_tokens=6)
    assert (whole.status, whole.incomplete_details.reason, whole.output_text) == (
        "incomplete", "max_output_tokens", "A long",
    )  # fmt: skip
    assert whole.output[0].status == "incomplete"
    events = checked(ask(script, max_output_tokens=6, stream=True))
    assert (events[-1].type, events[-1].response.output_text) == ("response.incomplete", "A long")


def test_an_answer_without_a_word_is_an_empty_message(script: Any) -> None:
    script.says("")
    assert [item.type for item in ask(script).output] == ["message"]
    assert checked(ask(script, stream=True))[-1].response.output_text == ""


@pytest.mark.full
def test_a_real_model_answers_as_in_chat_completions(real_server: Any) -> None:
    client, model = real_server.openai, real_server.model
    same = {"model": model, "temperature": 0}
    messages = [{"role": "system", "content": "the cat"}, {"role": "user", "content": "the dog reads"}]
    chat = client.chat.completions.create(**same, messages=messages, max_tokens=12)
    whole = client.responses.create(
        **same, instructions="the cat", input="the dog reads", max_output_tokens=12
    )
    last = checked(client.responses.create(**same, input=messages, max_output_tokens=12, stream=True))[-1]
    assert whole.output_text == last.response.output_text == chat.choices[0].message.content
    assert whole.usage.input_tokens == last.response.usage.input_tokens == chat.usage.prompt_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_thoughts_text_and_calls_are_items_in_the_order_of_the_model(script: Any, stream: bool) -> None:
    script.says(f"<think>\n{THOUGHTS}\n</think>\n\nI look.{CALL}{CALL}", TEMPLATE)
    if stream:
        events = checked(ask(script, tools=[WEATHER], stream=True))
        response = events[-1].response
        fragments = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
        assert len(fragments) > 10  # a byte a token
    else:
        response = ask(script, tools=[WEATHER])
    thoughts, message, first, second = response.output
    assert (thoughts.type, thoughts.content[0].text, thoughts.summary) == ("reasoning", THOUGHTS, [])
    assert (message.type, message.content[0].text) == ("message", "I look.")
    for call in (first, second):
        assert (call.type, call.name, json.loads(call.arguments)) == (
            "function_call", "weather", {"city": "Ulm"},
        )  # fmt: skip
    assert len({item.id for item in response.output} | {first.call_id, second.call_id}) == 6
    assert response.usage.output_tokens_details.reasoning_tokens > len(THOUGHTS)
    Response.model_validate(response.to_dict(mode="json"))


def test_a_conversation_is_kept_by_the_client(script: Any) -> None:
    script.says(f"<think>\n{THOUGHTS}\n</think>\n\nI look.{CALL}", TEMPLATE)
    given: list[Any] = [{"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]}]
    answer = ask(script, input=given, tools=[WEATHER])
    call = answer.output[-1]
    given += answer.output
    given.append({"type": "function_call_output", "call_id": call.call_id, "output": "rain"})
    script.says("It rains.", TEMPLATE)
    seen = seen_messages(script)
    assert ask(script, input=given, tools=[WEATHER]).output_text == "It rains."
    user, assistant, tool = seen[-1]
    assert user == {"role": "user", "content": "Weather?"}
    assert (assistant["role"], assistant["content"], assistant["reasoning_content"]) == (
        "assistant", "I look.", THOUGHTS,
    )  # fmt: skip
    function = assistant["tool_calls"][0]["function"]
    assert (function["name"], json.loads(function["arguments"])) == ("weather", {"city": "Ulm"})
    assert tool == {"role": "tool", "content": "rain", "tool_call_id": call.call_id}


def seen_messages(script: Any) -> list[Any]:
    """What the model's template gets from now on."""
    seen: list[Any] = []
    original = type(script.tokenizer).apply_chat_template

    def template(messages: Any, *given: Any, **more: Any) -> list[int]:
        seen.append(messages)
        return list(original(script.tokenizer, messages, *given, **more))

    script.tokenizer.apply_chat_template = template
    return seen


@pytest.fixture(autouse=True)
def plain_template(script: Any) -> Iterator[None]:
    yield
    script.tokenizer.__dict__.pop("apply_chat_template", None)


def test_items_of_several_answers_stay_apart(script: Any) -> None:
    script.says("ok")
    seen = seen_messages(script)
    said = {"role": "assistant", "content": "One."}
    thought = {
        "type": "reasoning",
        "id": "rs_1",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": "2?"}],
    }
    again = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
             "content": [{"type": "output_text", "text": "Two.", "annotations": [], "logprobs": []}]}  # fmt: skip
    ask(script, input=[{"role": "developer", "content": "Count."}, said, thought, again])
    assert [(m["role"], m["content"], m.get("reasoning_content")) for m in seen[-1]] == [
        ("system", "Count.", None), ("assistant", "One.", None), ("assistant", "Two.", "2?"),
    ]  # fmt: skip


def test_the_clients_stream_helper_and_parse_read_it(script: Any) -> None:
    client, model = script.server.openai.responses, script.server.model
    script.says('{"x": 4}')
    parsed = client.parse(model=model, input="x?", text_format=Point)
    assert parsed.output_parsed == Point(x=4)
    assert json.loads(script.last_params().structured_outputs.json)["properties"]["x"]["type"] == "integer"
    with client.stream(model=model, input="x?", text_format=Point) as stream:
        snapshots = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert (final.output_parsed, snapshots[-1]) == (Point(x=4), '{"x": 4}')
    script.says(CALL, TEMPLATE)
    with client.stream(model=model, input="?", tools=[WEATHER]) as stream:
        [call] = stream.get_final_response().output
    assert (call.name, call.parsed_arguments) == ("weather", {"city": "Ulm"})
    forced = ask(script, tools=[WEATHER], tool_choice={"type": "function", "name": "weather"})
    assert [item.type for item in forced.output] == ["function_call"]


def test_the_async_client_reads_it(script: Any) -> None:
    script.says('{"x": 4}')
    server = script.server

    async def talk() -> None:
        plain = DefaultAsyncHttpxClient(verify=False)
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", http_client=plain) as client:
            whole = await client.responses.create(model=server.model, input="x?")
            parsed = await client.responses.parse(model=server.model, input="x?", text_format=Point)
            async with client.responses.stream(model=server.model, input="x?", text_format=Point) as stream:
                final = await stream.get_final_response()
        assert whole.output_text == '{"x": 4}'
        assert parsed.output_parsed == final.output_parsed == Point(x=4)

    asyncio.run(talk())


def test_logprobs_stand_beside_the_text(script: Any) -> None:
    script.says("Ja")
    include = ["message.output_text.logprobs"]
    whole = ask(script, include=include, top_logprobs=2)
    entries = whole.output[0].content[0].logprobs
    assert [entry.token for entry in entries][:2] == ["J", "a"]
    assert all(len(entry.top_logprobs) == 2 for entry in entries)
    events = checked(ask(script, include=include, top_logprobs=2, stream=True))
    told = [entry for e in events if e.type == "response.output_text.delta" for entry in e.logprobs]
    assert [entry.token for entry in told][:2] == ["J", "a"]


USER = {"role": "user", "content": "x"}


@pytest.mark.parametrize(("body", "param", "words"), [
    ({"previous_response_id": "resp_1"}, "previous_response_id", ["resp_1", "whole conversation"]),
    ({"store": True}, "store", ["not stored"]),
    ({"background": True}, "background", ["connection"]),
    ({"tools": [{"type": "web_search"}]}, "tools.0.type", ["web_search", "function"]),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools.0.name", ["missing"]),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input.0", ["function_call_output"]),
    ({"input": [{**USER, "content": [{"type": "input_image", "image_url": "x"}]}]}, "input.0.content.0.type", ["input_image"]),
    ({"input": []}, "input", ["[]"]),
    ({"input": "y" * 3000}, "input", ["2047"]),
    ({"reasoning": {"effort": "high"}}, "reasoning.effort", ["high"]),
    ({"max_output_tokens": 0}, "max_output_tokens", ["max_output_tokens must be", "0"]),
    ({"max_tokens": 5}, "max_tokens", ["max_output_tokens"]),
    ({"top_logprobs": 21}, "top_logprobs", ["21", "20"]),
    ({"truncation": "auto"}, "truncation", ["auto"]),
    ({"instruction": "x"}, "instruction", ["'instructions'"]),
    ({"text": {"format": {"type": "json_schema", "name": "s"}}}, "text.format.schema", ["missing"]),
    (
        {"text": {"format": {"type": "json_schema", "name": "s", "strict": True, "schema": {"type": "object"}}}},
        "text.format.schema", ["additionalProperties", "text.format.schema"],
    ),
    ({"tools": [WEATHER, WEATHER], "tool_choice": "required"}, "tools.1.name", ["two tools"]),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice.name", ["'g'"]),
])  # fmt: skip
def test_what_is_not_served_is_refused_by_the_name_that_the_caller_wrote(
    script: Any, body: dict[str, Any], param: str, words: list[str]
) -> None:
    script.says("", TEMPLATE)
    with pytest.raises(BadRequestError) as caught:
        ask(script, extra_body=body)
    assert caught.value.param == param, caught.value
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_step_that_fails_is_told_as_the_last_event(serve: Any) -> None:
    with serve(partial(fake_worker, delay_s=0.0, fail_at={8: RuntimeError("bang")})) as server:
        ask = {"model": server.model, "input": "A prompt of more than one block of sixteen tokens."}
        events = list(server.openai.responses.create(**ask, stream=True))
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert (events[-1].type, events[-1].response.status) == ("response.failed", "failed")
        assert "bang" in events[-1].response.error.message
        assert any(event.type == "response.output_text.delta" for event in events)
        assert server.openai.responses.create(**ask, max_output_tokens=4).usage.output_tokens == 4
