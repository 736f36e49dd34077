"""Several versions on the Playground: asked at once, each in its own column, failing and stopping alone."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from page_world import FakeHost, ToolTokenizer, html_of, spoken
from records_world import make_model
from streamlit.testing.v1 import AppTest

from engine.fake_runner import scripted
from engine.fake_tokenizer import FakeTokenizer
from engine.sampling_params import SamplingParams
from workbench.ui import resources
from workbench.ui.components import side_by_side
from workbench.ui.conversations import Request, ask, new_conversation


def say(at: AppTest, text: str) -> AppTest:
    return at.chat_input[0].set_value(text).run()


def prompt_sizes(fake: FakeHost, model: str | None = None) -> list[int]:
    return [record.num_prompt_tokens for record in fake.host.worker(model).records.requests()]


@pytest.fixture
def beside(ready_host, open_page, tmp_path: Path):
    """Opens the page on a default model and others beside it, by name with their runners' options."""

    def make(default: dict[str, Any] | None = None, **others: dict[str, Any]) -> tuple[FakeHost, AppTest]:
        fake: FakeHost = ready_host(**(default or {}))
        for seed, (name, options) in enumerate(others.items()):
            fake.load(make_model(tmp_path / name, seed), **options)
        at = open_page("playground")
        at.multiselect(side_by_side.KEY).set_value(list(others)).run()
        assert not at.exception
        return fake, at

    return make


def test_every_version_is_asked_at_once_and_sees_its_own_answers(beside):
    fake, at = beside(
        {"choose": scripted("Yes.")},
        left={"choose": scripted("No, never.")},
        right={"choose": scripted("Maybe.")},
    )
    assert "held out from its training" in html_of(at)
    assert at.chat_input[0].placeholder == "Ask all 3; Enter sends"
    say(at, "one")
    assert not at.exception
    shown = html_of(at)
    assert shown.count("TTFT") == 3
    for answer in ("Yes.", "No, never.", "Maybe."):
        assert all(f">{letter}</span>" in shown for letter in answer.replace(" ", ""))
    assert shown.count('class="q-version"') >= 3
    assert shown.count('<div class="q-answer">one</div>') == 1
    say(at, "two")
    tokenizer = FakeTokenizer()
    for model, answer in ((None, "Yes."), ("left", "No, never."), ("right", "Maybe.")):
        history = [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": answer},
            {"role": "user", "content": "two"},
        ]
        assert prompt_sizes(fake, model)[-1] == len(tokenizer.apply_chat_template(history))


def test_version_of_a_link_that_is_not_loaded_is_told(ready_host, open_page):
    ready_host()
    at = open_page("playground")
    assert not at.multiselect  # there is nothing to choose
    at.query_params[side_by_side.KEY] = "gone · 12345678"
    at.run()
    assert not at.exception
    assert "not loaded here: gone · 12345678" in html_of(at)
    assert not at.chat_input[0].disabled


def test_broken_step_fails_its_own_column_only(beside):
    fake, at = beside({"choose": scripted("Yes.")}, left={"choose": scripted("No.")})
    fake.runners["left"].fail_next(RuntimeError("a step broke"))
    say(at, "one")
    assert not at.exception
    shown = html_of(at)
    assert shown.count("The answer ended with an error") == 1
    assert "a step broke" in shown
    assert "end of text" in shown
    say(at, "two")
    assert "end of text" in html_of(at)


def test_request_that_one_version_refuses_is_refused_in_its_column(beside):
    fake, at = beside({"num_blocks": 8, "choose": scripted("Yes.")}, left={"choose": scripted("No.")})
    at.number_input("max_tokens").set_value(20).run()
    say(at, "a" * 300)  # 128 tokens fit into eight blocks
    assert not at.exception
    assert html_of(at).count("The request was refused") == 1
    assert prompt_sizes(fake) == []
    assert len(prompt_sizes(fake, "left")) == 1


def test_version_that_went_away_leaves_its_answers_and_the_others(beside):
    fake, at = beside({"choose": scripted("Yes.")}, left={"choose": scripted("No.")})
    say(at, "one")
    fake.host.unload("left")
    say(at, "two")
    assert not at.exception
    assert html_of(at).count("TTFT") == 3  # two answers to the first question, one to the second
    assert len(prompt_sizes(fake)) == 2


def test_one_that_was_stopped_keeps_what_it_said_and_the_other_goes_on(beside):
    _, at = beside({"delay_s": 0.01, "choose": lambda _id, _index: ord("x")}, left={"delay_s": 0.01})
    conversation, host = new_conversation(), resources.host()
    params = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True, logprobs=1)
    versions = {resident.id: resident for resident in host.resident()}
    question = ({"role": "user", "content": "hi"},)
    turn = ask(host.worker, conversation, versions, question, Request(params))
    resources.conversations().keep(conversation)
    first = next(iter(turn.replies.values())).last
    at.query_params["chat"] = conversation.id
    stopping = threading.Timer(0.2, first.stop)
    stopping.start()
    at.run()
    stopping.join()
    assert not at.exception
    shown = html_of(at)
    assert shown.count("TTFT") == 2
    assert shown.count("<span>stopped</span>") == 1
    assert shown.count("token limit") == 1
    assert "aria-busy" not in shown


def test_dead_engine_of_the_first_version_leaves_the_others_at_work(beside):
    from engine.errors import EngineDeadError

    fake, at = beside({"choose": scripted("Yes.")}, left={"choose": scripted("No.")})
    fake.runner.fail_next(EngineDeadError("the device is gone"))
    say(at, "one")
    assert not at.exception
    assert "the device is gone" in html_of(at)
    assert "end of text" in html_of(at)
    say(at, "two")
    assert html_of(at).count("end of text") == 2


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = '<tool_call>{"name":"weather","arguments":{"city":"<b>Ulm"}}</tool_call>'


def test_call_is_shown_answered_and_gone_on_with_in_its_own_column(beside):
    fake, at = beside(
        {"choose": spoken("Let me see." + CALL, "Sunny there."), "tokenizer": ToolTokenizer()},
        left={"choose": spoken("No idea."), "tokenizer": ToolTokenizer()},
    )
    at.text_area("tools").set_value(json.dumps(TOOLS)).run()
    say(at, "How is the weather?")
    assert not at.exception
    shown = html_of(at)
    assert "<b>weather</b>" in shown
    assert "&lt;b&gt;Ulm" in shown
    assert ">&lt;tool_call&gt;</span>" not in shown
    result = next(area for area in at.text_area if area.label == "Result of weather")
    result.set_value("sun, 21 °C")
    next(button for button in at.button if button.label == "Send results").click().run()
    assert not at.exception
    shown = html_of(at)
    assert '<div class="q-answer">sun, 21 °C</div>' in shown
    assert not any(button.label == "Send results" for button in at.button)
    assert len(prompt_sizes(fake)) == 2
    assert len(prompt_sizes(fake, "left")) == 1
    code = "\n".join(block.value for block in at.code)
    for part in ('"tool_call_id"', '"tools"', "sun, 21", '"role": "tool"'):
        assert part in code


def test_reasoning_is_folded_above_the_answer(ready_host, open_page):
    fake: FakeHost = ready_host(
        choose=spoken("<think>\n2 and 2\n</think>\n\nIt is 4.", "Yes."), tokenizer=ToolTokenizer()
    )
    at = say(open_page("playground"), "2+2?")
    shown = html_of(at)
    assert '<details class="q-reasoning"><summary>Reasoning <span>' in shown
    answer = shown[shown.index("q-reasoning") :]
    assert "think&gt;" not in answer.split("q-doubt")[0].replace("data-tip", "")
    say(at, "sure?")
    prompt = FakeTokenizer().apply_chat_template(
        [
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "content": "It is 4."},
            {"role": "user", "content": "sure?"},
        ]
    )
    assert prompt_sizes(fake)[-1] == len(prompt)


def test_answer_that_is_json_is_a_tree_and_the_code_asks_for_it(ready_host, open_page):
    answer = '{"city": "Ulm", "at": [1, 2]}'
    ready_host(choose=scripted(answer))
    at = open_page("playground")
    at.selectbox("output").set_value("JSON schema").run()
    at.text_area("output_json").set_value('{"type": ').run()
    assert any("is no JSON schema" in error.value for error in at.error)
    assert at.chat_input[0].disabled
    assert "is no JSON schema" in at.chat_input[0].placeholder
    at.text_area("output_json").set_value('{"type": "object"}').run()
    say(at, "where?")
    assert not at.exception
    assert "✓ JSON parses" in html_of(at)
    assert [json.loads(one.value) for one in at.json] == [json.loads(answer)]
    code = "\n".join(block.value for block in at.code)
    assert "'structured_outputs': {'json': {'type': 'object'}}" in code


def test_tools_that_are_none_are_told_and_the_other_fields_stay(ready_host, open_page):
    ready_host()
    at = open_page("playground")
    at.selectbox("output").set_value("Choice").run()
    at.text_area("output_choice").set_value("yes\nno")
    at.text_area("tools").set_value('[{"type": "function", "function": {}}]').run()
    assert any("tools.0.function.name" in error.value for error in at.error)
    assert at.text_area("output_choice").value == "yes\nno"
    at.text_area("tools").set_value(json.dumps(TOOLS)).run()
    assert not at.error
    assert not at.chat_input[0].disabled
