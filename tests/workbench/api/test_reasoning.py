"""Reasoning apart from the answer, in messages, streams, usage and the request log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError

from engine.sampling_params import SamplingParams
from workbench.chat_request import ChatOptions
from workbench.services import Services
from workbench.settings import Settings
from workbench.terminal_chat import Answer, ServerPartner

TEMPLATE = "{# <think></think> <tool_call> #}"
THOUGHTS, ANSWER = "Hm.\n1 + 1?", "2."
TEXT = f"<think>\n{THOUGHTS}\n</think>\n\n{ANSWER}"


@pytest.mark.parametrize("opens", [False, True])
def test_reasoning_is_told_apart_under_both_of_its_names(script: Any, opens: bool) -> None:
    script.says(TEXT.removeprefix("<think>\n") if opens else TEXT, TEMPLATE, opens_reasoning=opens)
    answer = script.ask()
    message = answer.choices[0].message
    assert (message.content, message.reasoning, message.reasoning_content) == (ANSWER, THOUGHTS, THOUGHTS)
    num_thoughts = len(f"{THOUGHTS}\n".encode()) + (0 if opens else 1)  # without the markers; a byte a token
    assert answer.usage.completion_tokens_details.reasoning_tokens == num_thoughts
    chunks = list(script.ask(stream=True, stream_options={"include_usage": True}))
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    for name, text in (("content", ANSWER), ("reasoning", THOUGHTS), ("reasoning_content", THOUGHTS)):
        assert "".join(getattr(delta, name, None) or "" for delta in deltas) == text
    assert chunks[-1].usage.completion_tokens_details.reasoning_tokens == num_thoughts


def test_reasoning_can_be_left_out(script: Any) -> None:
    script.says(TEXT, TEMPLATE)
    message = script.ask(extra_body={"include_reasoning": False}).choices[0].message
    assert (message.content, hasattr(message, "reasoning")) == (ANSWER, False)
    deltas = [c.choices[0].delta for c in script.ask(extra_body={"include_reasoning": False}, stream=True)]
    assert "".join(delta.content or "" for delta in deltas) == ANSWER
    assert not any(hasattr(delta, "reasoning") for delta in deltas)


def test_the_templates_variables_are_passed_on(script: Any) -> None:
    script.says(ANSWER, TEMPLATE, opens_reasoning=True)
    thinking = script.ask()
    assert (thinking.choices[0].message.content, thinking.choices[0].message.reasoning) == (None, ANSWER)
    plain = script.ask(extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert plain.choices[0].message.content == ANSWER
    assert plain.usage.prompt_tokens < thinking.usage.prompt_tokens


def test_calls_behind_reasoning_are_found(script: Any) -> None:
    script.says(f'{TEXT}<tool_call>{{"name": "f", "arguments": {{}}}}</tool_call>', TEMPLATE)
    choice = script.ask(tools=[{"type": "function", "function": {"name": "f"}}]).choices[0]
    assert (choice.message.content, choice.message.reasoning, choice.finish_reason) == (
        ANSWER,
        THOUGHTS,
        "tool_calls",
    )
    assert choice.message.tool_calls[0].function.name == "f"


POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}},
    "required": ["x"],
    "additionalProperties": False,
}
AS_POINT = {"type": "json_schema", "json_schema": {"name": "point", "strict": True, "schema": POINT}}


@pytest.mark.parametrize("opens", [False, True])
@pytest.mark.parametrize("answer", ['{"x": 1}', "no JSON"])
def test_a_constrained_answer_follows_the_reasoning(script: Any, opens: bool, answer: str) -> None:
    text = f"<think>\n{THOUGHTS}\n</think>\n\n{answer}"
    script.says(text.removeprefix("<think>\n") if opens else text, TEMPLATE, opens_reasoning=opens)
    message = script.ask(response_format=AS_POINT).choices[0].message
    assert message.reasoning == THOUGHTS
    assert isinstance(json.loads(message.content)["x"], int)
    deltas = [chunk.choices[0].delta for chunk in script.ask(response_format=AS_POINT, stream=True)]
    assert "".join(delta.content or "" for delta in deltas) == message.content
    assert "".join(getattr(delta, "reasoning", None) or "" for delta in deltas) == THOUGHTS


@pytest.mark.parametrize(
    ("wish", "answer"),
    [
        ({"json_object": True}, '{"a": [1]}'),
        ({"choice": ["yes", "no"]}, "no"),
        ({"regex": "[0-9]{3}"}, "123"),
        ({"grammar": 'root ::= "a" | "b"'}, "b"),
        ({"structural_tag": {"format": {"type": "const_string", "value": "c"}}}, "c"),
    ],
)
def test_every_kind_of_constraint_holds_behind_reasoning(script: Any, wish: Any, answer: str) -> None:
    script.says(f"{THOUGHTS}\n</think>\n\n{answer}", TEMPLATE, opens_reasoning=True)
    message = script.ask(extra_body={"structured_outputs": wish}).choices[0].message
    assert (message.reasoning, message.content) == (THOUGHTS, answer)


def test_where_the_prompt_turns_reasoning_off_a_constrained_answer_begins_at_once(script: Any) -> None:
    script.says('{"x": 1}', "{# <think></think> #}")
    script.tokenizer.closes_reasoning = True
    message = script.ask(response_format=AS_POINT).choices[0].message
    assert (message.content, hasattr(message, "reasoning")) == ('{"x": 1}', False)
    assert script.last_params().structured_outputs.json is not None


def test_a_compact_answer_behind_reasoning_is_refused(script: Any) -> None:
    script.says(TEXT, TEMPLATE)
    wish = {"json": POINT, "any_whitespace": False}
    with pytest.raises(BadRequestError, match="reasons before its answer") as caught:
        script.ask(extra_body={"structured_outputs": wish})
    assert caught.value.param == "structured_outputs.any_whitespace"


@pytest.mark.parametrize(
    ("template", "written"),
    [
        (TEMPLATE, '<tool_call>\n{"name": "f", "arguments": {"x": 1}}</tool_call>'),
        ("{# <think></think> func_name1( #}", '[{"name":"f","parameters":{"x":1}}]'),
    ],
)
def test_a_forced_call_follows_the_reasoning(script: Any, template: str, written: str) -> None:
    script.says(f"{THOUGHTS}\n</think>\n\n{written}", template, opens_reasoning=True)
    tools = [{"type": "function", "function": {"name": "f", "parameters": POINT}}]
    message = script.ask(tools=tools, tool_choice="required").choices[0].message
    assert (message.reasoning, message.content) == (THOUGHTS, None)
    assert json.loads(message.tool_calls[0].function.arguments) == {"x": 1}


def test_without_reasoning_markers_in_the_template_nothing_is_split(script: Any) -> None:
    script.says("a <b>")
    answer = script.ask()
    assert answer.choices[0].message.content == "a <b>"
    assert answer.usage.completion_tokens_details is None


def test_the_terminal_shows_reasoning_first_and_keeps_the_answer_alone(script: Any) -> None:
    script.says(TEXT, TEMPLATE)
    partner, answer = ServerPartner(script.server.url), Answer()
    shown = "".join(
        partner.ask([{"role": "user", "content": "?"}], ChatOptions(SamplingParams(max_tokens=256)), answer)
    )
    partner.close()
    assert (shown, answer.text) == (f"{THOUGHTS}\n\n{ANSWER}", ANSWER)
    assert answer.ttft_ms is not None


def test_the_request_log_keeps_reasoning_and_calls_as_the_model_wrote_them(
    script: Any, serve: Any, tmp_path: Path
) -> None:
    text = f'{TEXT}<tool_call>{{"name": "f", "arguments": {{}}}}</tool_call>'
    own = type(script)()
    own.says(text, TEMPLATE)
    services = Services(Settings(home_dir=tmp_path, request_text="full"))
    services.open()
    try:
        with serve(own.worker, services=services) as server:
            tools = [{"type": "function", "function": {"name": "f"}}]
            assert server.post(tools=tools, stream=True).status_code == 200
        assert services.request_log is not None
        [row] = services.request_log.read(tmp_path).to_dict("records")
    finally:
        services.close()
    assert row["output"] == text
