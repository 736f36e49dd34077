"""Tool calls through the official client: found in each format, streamed, forced; and what the engine is asked for."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai import BadRequestError

from engine.config import EngineConfig
from workbench.host import load_worker
from workbench.settings import bundled_model

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather", "description": "Says the weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
                       "additionalProperties": False},
    },
}  # fmt: skip
TIME = {"type": "function", "function": {"name": "time"}}
TOOLS = [WEATHER, TIME]
CALL = '<|tool_call|>{"name":"weather","arguments":{"city":"Köln"}}<|/tool_call|>'
TEMPLATES = {
    "hermes": ("{# <tool_call> #}", 'So:\n<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'),
    "qwen3_coder": ("{# <tool_call> <function= #}", "So:\n<tool_call>\n<function=weather>\n<parameter=city>\nKöln\n</parameter>\n"
                    "</function>\n</tool_call>"),
    "llama3_json": ('{# "parameters": dictionary #}', '{"name": "weather", "parameters": {"city": "Köln"}}'),
    "mistral": ("{# [TOOL_CALLS] #}", 'So:[TOOL_CALLS]weather[ARGS]{"city": "Köln"}'),
    "pythonic": ("{# func_name1( #}", "[weather(city='Köln')]"),
    "quire": (None, f"So:{CALL}"),
}  # fmt: skip


def streamed(chunks: Any) -> tuple[str, list[dict[str, str]], Any]:
    """Content, calls and finish reason of a stream, put together as clients do it."""
    content, calls, finish = "", [], None
    for chunk in chunks:
        choice = chunk.choices[0]
        content += choice.delta.content or ""
        finish = choice.finish_reason or finish
        for delta in choice.delta.tool_calls or ():
            if delta.id is not None:
                assert (delta.index, delta.type, bool(delta.function.name)) == (len(calls), "function", True)
                calls.append({"id": delta.id, "name": delta.function.name, "arguments": ""})
            calls[delta.index]["arguments"] += delta.function.arguments or ""
    return content, calls, finish


@pytest.mark.parametrize("name", TEMPLATES)
def test_calls_of_each_template_come_whole_and_streamed(script: Any, name: str) -> None:
    template, answer = TEMPLATES[name]
    script.says(answer, template)
    choice = script.ask(tools=TOOLS).choices[0]
    [call] = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Köln"})
    assert (choice.message.content, choice.finish_reason) == (
        "So:" if answer.startswith("So") else None,
        "tool_calls",
    )
    content, [told], finish = streamed(script.ask(tools=TOOLS, stream=True))
    assert (content or None, told["name"], told["arguments"], finish) == (
        choice.message.content, "weather", call.function.arguments, "tool_calls",
    )  # fmt: skip
    if name == "mistral":
        assert len(call.id) == 9


def test_arguments_are_streamed_as_the_model_writes_them(script: Any) -> None:
    script.says(CALL * 2)
    chunks = list(script.ask(tools=TOOLS, stream=True))
    content, calls, finish = streamed(chunks)
    assert (content, [call["arguments"] for call in calls], finish) == (
        "",
        ['{"city":"Köln"}'] * 2,
        "tool_calls",
    )
    fragments = [d.function.arguments for c in chunks for d in c.choices[0].delta.tool_calls or ()]
    assert len([text for text in fragments if text]) > 10  # a byte a token
    assert len({call["id"] for call in calls}) == 2


def test_one_call_ends_the_answer_where_calls_are_not_parallel(script: Any) -> None:
    script.says(f"Let me see.{CALL}{CALL}")
    whole = script.ask(tools=TOOLS, parallel_tool_calls=False)
    choice = whole.choices[0]
    assert (len(choice.message.tool_calls), choice.finish_reason, choice.stop_reason) == (
        1,
        "tool_calls",
        None,
    )
    assert whole.usage.completion_tokens < len(f"Let me see.{CALL}".encode())  # the second was not computed
    assert len(script.ask(tools=TOOLS).choices[0].message.tool_calls) == 2
    assert len(streamed(script.ask(tools=TOOLS, parallel_tool_calls=False, stream=True))[1]) == 1


@pytest.mark.parametrize(
    "answer", ["<|tool_call|>{not json<|/tool_call|>!", '<|tool_call|>{"name": "weather"']
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_broken_tool_call_is_given_back_as_the_model_wrote_it(
    script: Any, answer: str, stream: bool
) -> None:
    script.says(answer)
    if stream:
        assert streamed(script.ask(tools=TOOLS, stream=True)) == (answer, [], "stop")
        return
    choice = script.ask(tools=TOOLS).choices[0]
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (answer, None, "stop")


def test_a_call_cut_by_length_is_told_as_such(script: Any) -> None:
    script.says(CALL)
    choice = script.ask(tools=TOOLS, max_tokens=40).choices[0]
    assert (choice.finish_reason, choice.message.tool_calls) == ("length", None)
    assert CALL.startswith(choice.message.content)
    assert choice.message.content
    _, [call], finish = streamed(script.ask(tools=TOOLS, max_tokens=40, stream=True))
    assert (finish, call["name"]) == ("length", "weather")
    assert '{"city":"Köln"}'.startswith(call["arguments"])


def test_without_tools_the_calls_tokens_are_hidden_like_all_special_ones(script: Any) -> None:
    script.says("a<|tool_call|>b")
    assert script.ask().choices[0].message.content == "ab"
    assert script.ask(tools=TOOLS, tool_choice="none").choices[0].message.content == "ab"


def forced(script: Any, stream: bool, **body: Any) -> tuple[str, str, str, str]:
    """Content, name and arguments of the one call, and the finish reason."""
    answer = script.ask(stream=stream, **body)
    if stream:
        content, [call], finish = streamed(answer)
        return content, call["name"], call["arguments"], finish
    [choice] = answer.choices
    [called] = choice.message.tool_calls
    return choice.message.content or "", called.function.name, called.function.arguments, choice.finish_reason


NAMED = {"type": "function", "function": {"name": "weather"}}
PARAMETERS = WEATHER["function"]["parameters"]  # type: ignore[index]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("name", "opening", "key"),
    [
        ("quire", "<|tool_call|>", "arguments"),
        ("hermes", "<tool_call>\n", "arguments"),
        ("llama3_json", "", "parameters"),
    ],
)
def test_a_forced_call_is_in_the_models_own_form(
    script: Any, name: str, opening: str, key: str, stream: bool
) -> None:
    script.says(f'{{"name":"weather","{key}":{{"city":"Ulm"}}}}', TEMPLATES[name][0])
    plain = script.tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tools=TOOLS)
    wanted = ("", "weather", '{"city":"Ulm"}', "tool_calls")
    assert forced(script, stream, tools=TOOLS, tool_choice="required") == wanted
    admission = next(plan.admitted[-1] for plan in reversed(script.runner.plans) if plan.admitted)
    assert list(admission.token_ids) == [*plain, *script.tokenizer.encode(opening)]
    any_of = json.loads(script.last_params().structured_outputs.json)["anyOf"]
    assert [each["properties"]["name"]["const"] for each in any_of] == ["weather", "time"]
    assert any_of[0]["properties"][key] == PARAMETERS
    assert forced(script, stream, tools=TOOLS, tool_choice=NAMED) == wanted
    asked = json.loads(script.last_params().structured_outputs.json)
    assert asked["properties"] == {"name": {"const": "weather"}, key: PARAMETERS}


@pytest.mark.parametrize("stream", [False, True])
def test_a_required_call_is_a_list_where_the_models_calls_are_no_objects(script: Any, stream: bool) -> None:
    script.says('[{"name":"weather","parameters":{"city":"Ulm"}}]', TEMPLATES["pythonic"][0])
    assert forced(script, stream, tools=TOOLS, tool_choice="required") == (
        "", "weather", '{"city":"Ulm"}', "tool_calls",
    )  # fmt: skip
    asked = script.last_params().structured_outputs
    schema = json.loads(asked.json)
    assert (schema["type"], schema["minItems"], "maxItems" in schema, asked.any_whitespace) == (
        "array",
        1,
        False,
        False,
    )
    assert [each["properties"]["name"]["const"] for each in schema["items"]["anyOf"]] == ["weather", "time"]
    assert schema["items"]["anyOf"][0]["properties"]["parameters"] == PARAMETERS
    script.says('[{"name":"time","parameters":{}}]', TEMPLATES["pythonic"][0])
    script.ask(tools=[TIME], tool_choice="required", parallel_tool_calls=False)
    schema = json.loads(script.last_params().structured_outputs.json)
    assert (schema["maxItems"], schema["items"]["properties"]["name"]) == (1, {"const": "time"})


@pytest.mark.parametrize("stream", [False, True])
def test_a_named_function_is_its_arguments_where_the_models_calls_are_no_objects(
    script: Any, stream: bool
) -> None:
    script.says('{"city":"Ulm"}', TEMPLATES["mistral"][0])
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}  # type: ignore[dict-item]
    assert forced(script, stream, tools=[strict, TIME], tool_choice=NAMED) == (
        "", "weather", '{"city":"Ulm"}', "tool_calls",
    )  # fmt: skip
    assert json.loads(script.last_params().structured_outputs.json) == PARAMETERS


@pytest.mark.parametrize("name", ["pythonic", "quire"])
def test_definitions_of_the_tools_schemas_are_found_from_the_root(script: Any, name: str) -> None:
    script.says(
        '[{"name":"f","parameters":{}}]' if name == "pythonic" else '{"name":"f","arguments":{}}',
        TEMPLATES[name][0],
    )
    parameters = {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/A"}},
        "$defs": {"A": {"type": "integer"}},
    }
    function = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    script.ask(tools=[function, TIME], tool_choice="required")
    schema = json.loads(script.last_params().structured_outputs.json)
    assert schema.pop("$defs") == {"A": {"type": "integer"}}
    assert "$defs" not in str(schema).replace("#/$defs/A", "")


STRICT = {"type": "function", "function": {**WEATHER["function"], "strict": True}}  # type: ignore[dict-item]
AS_CITY = {"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": PARAMETERS}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["quire", "hermes"])
def test_a_strict_tools_arguments_follow_its_schema_beside_free_text(
    script: Any, name: str, stream: bool
) -> None:
    written = TEMPLATES[name][1].replace('"Köln"', "17")  # not what the schema has
    script.says(written, TEMPLATES[name][0])
    content, called, arguments, finish = forced(script, stream, tools=[STRICT, TIME])
    assert (content, called, finish) == ("So:", "weather", "tool_calls")
    assert isinstance(json.loads(arguments)["city"], str)
    script.says("No call today.", TEMPLATES[name][0])
    assert script.ask(tools=[STRICT]).choices[0].message.content == "No call today."


def test_tools_that_are_not_strict_take_any_arguments_beside_one_that_is(script: Any) -> None:
    script.says(CALL.replace("weather", "time").replace('"Köln"', "17"))
    assert forced(script, False, tools=[STRICT, TIME])[1:3] == ("time", '{"city":17}')
    script.says(CALL.replace("weather", "nobody"))
    assert forced(script, False, tools=[STRICT])[1] == "weather"


def test_one_strict_call_ends_the_answer_where_calls_are_not_parallel(script: Any) -> None:
    script.says(f"{CALL}\n{CALL}")
    assert len(script.ask(tools=[STRICT]).choices[0].message.tool_calls) == 2
    assert len(script.ask(tools=[STRICT], parallel_tool_calls=False).choices[0].message.tool_calls) == 1


def test_an_answer_of_a_form_stands_beside_tools_either_comes(script: Any) -> None:
    script.says('{"city": "Ulm"}')
    message = script.ask(tools=TOOLS, response_format=AS_CITY).choices[0].message
    assert (message.content, message.tool_calls) == ('{"city": "Ulm"}', None)
    script.says(CALL)
    assert forced(script, False, tools=TOOLS, response_format=AS_CITY)[:2] == ("", "weather")
    script.says("neither")
    message = script.ask(tools=TOOLS, response_format=AS_CITY).choices[0].message
    assert message.tool_calls or "city" in json.loads(message.content)


@pytest.mark.parametrize("body", [{"tool_choice": "required"}, {}])
def test_an_answer_of_a_form_and_calls_that_nobody_could_tell_from_it_are_refused(
    script: Any, body: Any
) -> None:
    script.says("", TEMPLATES["llama3_json"][0])
    with pytest.raises(BadRequestError, match="contradict each other"):
        script.ask(tools=TOOLS, response_format=AS_CITY, **body)


def test_a_forced_call_cut_by_length_is_no_call(script: Any) -> None:
    script.says('{"name":"weather","arguments":{"city":"Ulm"}}')
    choice = script.ask(tools=TOOLS, tool_choice="required", max_tokens=40).choices[0]
    assert (choice.finish_reason, choice.message.tool_calls) == ("length", None)
    assert choice.message.content == '{"name":"weather","arguments":{"city":"U'


def test_the_bundled_model_calls_a_tool_and_uses_its_result(serve: Any) -> None:
    chips = json.loads((bundled_model() / "prompt_chips.json").read_text("utf-8"))["chips"]
    chip = next(each for each in chips if each["family"] == "tool_call")
    config = EngineConfig(model=str(bundled_model()), device="cpu", num_blocks=128, num_threads=1)
    with serve(load_worker, config) as server:
        ask = {"model": server.model, "messages": chip["messages"], "tools": chip["tools"], "temperature": 0}
        choice = server.openai.chat.completions.create(**ask).choices[0]
        _, [told], finish = streamed(server.openai.chat.completions.create(**ask, stream=True))
        required = server.openai.chat.completions.create(**ask, tool_choice="required").choices[0].message
        [call] = choice.message.tool_calls
        result = {"role": "tool", "tool_call_id": call.id, "content": "{}"}
        again = {**ask, "messages": [*chip["messages"], choice.message, result]}
        after = server.openai.chat.completions.create(**again).choices[0]
    assert (call.function.name, json.loads(call.function.arguments)) == (
        chip["check"]["tool_name"], chip["check"]["arguments"],
    )  # fmt: skip
    assert (told["name"], told["arguments"], finish) == (
        call.function.name,
        call.function.arguments,
        "tool_calls",
    )
    assert required.tool_calls[0].function == call.function
    assert choice.finish_reason == "tool_calls"
    assert after.finish_reason == "stop"
    assert after.message.content
