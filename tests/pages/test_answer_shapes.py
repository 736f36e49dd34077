"""An answer's parts as they are shown, and whether it has the form that was asked for."""

from __future__ import annotations

import json

import pytest
from page_world import ToolTokenizer, make_worker, spoken

from engine.fake_tokenizer import FakeTokenizer
from engine.sampling_params import SamplingParams
from engine.structured_outputs import StructuredOutputsParams
from workbench.chat_request import prepare, read_tools
from workbench.errors import ApiError, UnsupportedFieldError
from workbench.resident import HostPhase, HostState, Resident
from workbench.ui.answers import Answer
from workbench.ui.components import chat_message
from workbench.ui.components.output_controls import FORMS
from workbench.ui.conversations import Request, ask, new_conversation
from workbench.ui.output_shape import shape_of

VERSION = Resident(
    "m", "m", None, HostState(HostPhase.READY), deterministic=False, is_default=True, digest=""
)
TOOLS = ({"type": "function", "function": {"name": "weather"}},)
TOKENIZER = ToolTokenizer()
CALL = '<tool_call>{"name":"weather","arguments":{"city":"Ulm"}}</tool_call>'


@pytest.fixture
def answer_with():
    """Answers of a fake engine: the text that it gives, and what it was asked for."""
    workers = []

    def make(text: str, max_tokens: int = 200, tokenizer=TOKENIZER, **request) -> Answer:
        worker, _ = make_worker(choose=spoken(text), tokenizer=tokenizer)
        worker.start()
        workers.append(worker)
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, logprobs=2)
        question = ({"role": "user", "content": "hi"},)
        turn = ask(lambda _: worker, new_conversation(), {"m": VERSION}, question, Request(params, **request))
        assert turn.replies["m"].last.wait(20)
        return turn.replies["m"].last

    yield make
    for worker in workers:
        worker.close()


def test_reasoning_tells_its_tokens_and_probabilities_stay_with_both_parts(answer_with):
    answer = answer_with("<think>4 is 4</think>4")
    assert (answer.output.reasoning, answer.output.content) == ("4 is 4", "4")
    assert answer.num_reasoning_tokens == len("<think>4 is 4")
    assert 0 <= answer.reasoning_ms <= answer.completion.e2e_ms
    thought, _, said = chat_message.finished(answer).partition("</details>")
    assert f"{len('<think>4 is 4')} tokens" in thought
    assert thought.count('class="q-tok"') == len("4 is 4")
    assert said.count('class="q-tok"') == 1  # the answer's own 4, not one of the reasoning's
    assert " open>" not in thought


def test_tools_need_a_model_that_can_call_them(answer_with):
    answer = answer_with("hi", tokenizer=FakeTokenizer(), tools=TOOLS)
    assert isinstance(answer.refusal, UnsupportedFieldError)
    assert "no tool calls of a known format" in chat_message.finished(answer)


def test_constrained_answer_follows_the_reasoning_that_the_template_opened():
    class Opens(ToolTokenizer):
        def apply_chat_template(self, *given, **more):
            return [*super().apply_chat_template(*given, **more), *self.encode("<think>\n")]

    asked = SamplingParams(structured_outputs=StructuredOutputsParams(choice=("yes", "no")))
    worker, _ = make_worker(tokenizer=Opens())
    ready = prepare(worker, [{"role": "user", "content": "hi"}], asked)
    assert TOKENIZER.decode(ready.prompt_ids, False).endswith("<think>\n")
    assert ready.syntax.is_open
    tag = json.loads(ready.params.structured_outputs.structural_tag)["format"]
    assert [part["type"] for part in tag["elements"]] == ["tag", "optional", "or"]
    worker.close()


def test_call_is_no_content_and_its_tokens_are_no_text(answer_with):
    answer = answer_with("Look:" + CALL, tools=TOOLS)
    assert answer.output.content == "Look:"
    assert [call.name for call in answer.output.calls] == ["weather"]
    assert answer.text == "Look:" + CALL
    shown = chat_message.finished(answer)
    assert '<div class="q-call"><b>weather</b>' in shown
    assert shown.count('class="q-tok"') == len("Look:")


JSON = '{"city": "Ulm", "at": [1, 2]}'
SHAPES = [
    ({"json_object": True}, JSON, 200, "ok", "JSON parses"),
    ({"json": {"type": "object"}}, JSON, 10, "warn", "cut by the token limit: the JSON is not whole"),
    ({"json_object": True}, "Ulm", 200, "bad", "no JSON: "),
    ({"json_object": True}, '{"a": NaN}', 200, "bad", "NaN is no JSON value"),
    ({"choice": ("yes", "no")}, "yes", 200, "ok", "one of the choices"),
    ({"choice": ("yes", "no")}, "yes", 2, "warn", "cut by the token limit: not whole"),
    ({"choice": ("yes", "no")}, "perhaps", 200, "bad", "none of the choices"),
    ({"regex": "a+"}, "aaa", 200, "", "ended by itself, under the regular expression"),
    ({"grammar": "root ::= [a]+"}, "aaa", 2, "warn", "cut by the token limit: not whole"),
]


@pytest.mark.parametrize(("form", "text", "max_tokens", "kind", "told"), SHAPES)
def test_answer_says_whether_it_has_its_form(form, text, max_tokens, kind, told, answer_with):
    answer = answer_with(text, max_tokens)  # as one may answer that does not follow the form
    answer.params = answer.params.with_(structured_outputs=StructuredOutputsParams(**form))
    shape = shape_of(answer)
    assert shape.kind == kind
    assert told in shape.told
    assert shape.tree == ({"city": "Ulm", "at": [1, 2]} if told == "JSON parses" else None)
    assert shape_of(answer_with(text)) is None


def test_every_form_reads_its_own_example():
    read = {form.field: form.read(form.example) for form in FORMS.values()}
    for field, value in read.items():
        StructuredOutputsParams.from_dict({field: value or True})
    assert read["choice"] == ("yes", "no")


@pytest.mark.parametrize(
    ("text", "param"),
    [("{", "tools"), ("{}", "tools"), ('[{"type": "function", "function": {}}]', "tools.0.function.name")],
)
def test_tools_are_checked_as_the_api_checks_them(text, param):
    with pytest.raises(ApiError) as caught:
        read_tools(text)
    assert caught.value.param == param


def test_no_tools_are_no_tools():
    assert read_tools(" \n") == ()
