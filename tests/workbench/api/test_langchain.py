"""LangChain's OpenAI chat model, unchanged, over chat completions and over responses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import BaseModel

pytestmark = pytest.mark.full  # its import takes longer than the tests
TEMPLATE = "{# <think></think> <tool_call> #}"
CALL = '<think>\nHm.\n</think>\n\nI look.<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}</tool_call>'


class Point(BaseModel):
    """A point."""

    x: int


def weather(city: str) -> str:
    """Says the weather."""
    return f"Rain in {city}."


@pytest.fixture(params=[False, True], ids=["chat", "responses"])
def chat_model(request: pytest.FixtureRequest, script: Any) -> Any:
    langchain_openai = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    server = script.server
    return langchain_openai.ChatOpenAI(
        model=server.model, base_url=f"{server.url}/v1", api_key="none", max_retries=0, use_responses_api=request.param
    )  # fmt: skip


def streamed(chunks: Any) -> Any:
    """All chunks together, as LangChain adds them."""
    whole = None
    for chunk in chunks:
        whole = chunk if whole is None else whole + chunk
    return whole


def test_answers_come_whole_and_streamed_with_their_usage(chat_model: Any, script: Any) -> None:
    script.says("Grüße")
    whole, told = chat_model.invoke("Hello"), streamed(chat_model.stream("Hello"))
    assert whole.text == told.text == "Grüße"
    assert whole.usage_metadata["output_tokens"] == len("Grüße".encode()) + 1
    script.says('{"x": 4}')
    assert chat_model.with_structured_output(Point).invoke("x?") == Point(x=4)


@pytest.mark.parametrize(
    "ask", [lambda model: model.invoke, lambda model: lambda text: streamed(model.stream(text))]
)
def test_a_tool_is_called_and_its_result_read(
    chat_model: Any, script: Any, ask: Callable[[Any], Any]
) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage

    script.says(CALL, TEMPLATE)
    model = chat_model.bind_tools([weather])
    first = ask(model)("Weather?")
    [call] = first.tool_calls
    assert (first.text, call["name"], call["args"]) == ("I look.", "weather", {"city": "Ulm"})
    script.says("It rains.", TEMPLATE)
    result = ToolMessage(weather(**call["args"]), tool_call_id=call["id"])
    assert model.invoke([HumanMessage("Weather?"), first, result]).text == "It rains."
