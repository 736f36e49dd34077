"""The Playground: asking, seeing probabilities and figures, keeping what was said, refusing what cannot run."""

from __future__ import annotations

import re
import threading
import time

import pytest
from page_world import FakeHost, html_of, make_worker
from records_world import eventually
from streamlit.testing.v1 import AppTest

from engine.fake_runner import scripted
from engine.request import FinishReason
from engine.sampling_params import SamplingParams
from engine.worker import EngineWorker
from workbench.access import keys
from workbench.access.principal import Right
from workbench.chat_output import OutputSyntax
from workbench.resident import HostPhase, HostState, Resident
from workbench.settings import Settings
from workbench.store import open_store
from workbench.ui import resources
from workbench.ui.answers import Answer, Begun, follow
from workbench.ui.components import chat_message
from workbench.ui.conversations import Conversation, Conversations, Request, ask, new_conversation

GREEDY = SamplingParams(max_tokens=20, temperature=0.0, logprobs=3)
LONG = GREEDY.with_(max_tokens=400)
VERSION = Resident(
    "m", "m", None, HostState(HostPhase.READY), deterministic=False, is_default=True, digest=""
)
HI = ({"role": "user", "content": "hi"},)


def say(at: AppTest, text: str) -> AppTest:
    return at.chat_input[0].set_value(text).run()


def answer_of(worker, params: SamplingParams, conversation: Conversation | None = None) -> Answer:
    """The running answer of a worker to "hi"."""
    turn = ask(lambda _: worker, conversation or new_conversation(), {"m": VERSION}, HI, Request(params))
    return turn.replies["m"].last


def test_chip_is_sent_with_a_click_and_answered_with_figures(ready_host, open_page):
    ready_host(choose=scripted("Good day."))
    at = open_page("playground")
    at.button("chip_0").click().run()
    assert not at.exception
    shown = html_of(at)
    assert "Hello there" in shown
    assert 'data-tip="G  36.79 %, rank 1' in shown
    for figure in ("TTFT", "TPOT", "tokens/s", "end of text", "<b>10</b> tokens", "seed "):
        assert figure in shown
    assert "least certain tokens" in shown
    assert "stop_it" not in [button.key for button in at.button]


def test_answer_is_escaped_and_never_markup(ready_host, open_page):
    said = '<img src="http://example.com/x.png" onerror=alert(1)>'
    ready_host(choose=scripted(said))
    at = say(open_page("playground"), "<script>alert(2)</script>")
    shown = html_of(at)
    assert "<img" not in shown
    assert "<script" not in shown
    assert "&lt;script&gt;alert(2)&lt;/script&gt;" in shown


def test_answer_that_ends_while_it_is_drawn_is_shown_finished(ready_host, open_page, monkeypatch):
    ready_host(choose=scripted("Yes."), delay_s=0.02)
    draw, drawn = chat_message.running, []

    def draw_until_it_has_ended(answer: Answer) -> str:
        drawn.append(draw(answer))
        while answer.running:
            time.sleep(0.005)
        return drawn[-1]

    monkeypatch.setattr(chat_message, "running", draw_until_it_has_ended)
    at = say(open_page("playground"), "one")
    assert drawn, "it had ended before it was drawn: nothing is proven"
    assert "TTFT" in html_of(at)
    assert "aria-busy" not in html_of(at)


def test_conversation_goes_on_and_survives_a_reload(ready_host, open_page):
    fake: FakeHost = ready_host(choose=scripted("Yes."))
    at = say(open_page("playground"), "one")
    say(at, "two")
    conversation_id = at.query_params["chat"]
    prompt = fake.worker.tokenizer.apply_chat_template(
        [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "two"},
        ]
    )
    assert fake.worker.records.requests()[-1].num_prompt_tokens == len(prompt)
    again = open_page("playground")
    assert "one" not in html_of(again)
    again.query_params["chat"] = conversation_id
    again.run()
    assert not again.exception
    for part in ("one", "two"):
        assert f'<div class="q-answer">{part}</div>' in html_of(again)


def test_new_chat_forgets_nothing_but_starts_empty(ready_host, open_page):
    ready_host(choose=scripted("Yes."))
    at = say(open_page("playground"), "one")
    next(b for b in at.button if b.label == "New chat").click().run()
    assert "held out from its training" in html_of(at)
    assert not at.exception


def test_controls_reach_the_request_and_the_address(ready_host, open_page):
    fake: FakeHost = ready_host()
    at = open_page("playground")
    at.number_input("max_tokens").set_value(5)
    at.toggle("ignore_eos").set_value(True)
    at.text_input("seed").set_value("7")
    at.text_area("system").set_value("Be brief.")
    at.number_input("presence_penalty").set_value(0.5)
    at.number_input("typical_p").set_value(0.8)
    at.text_input("logit_bias").set_value("7: -100, 9: 1.5")
    at.text_area("bad_words").set_value("never\nmind")
    at.run()
    say(at, "hello")
    assert not at.exception
    assert "seed 7" in html_of(at)
    assert "token limit" in html_of(at)
    assert fake.worker.records.requests()[-1].num_output_tokens == 5
    with_system = fake.worker.tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    )
    assert fake.worker.records.requests()[-1].num_prompt_tokens == len(with_system)
    codes = "\n".join(block.value for block in at.code)
    assert '"max_tokens": 5' in codes
    assert "'ignore_eos': True" in codes
    assert "seed=7" in codes
    assert "presence_penalty=0.5" in codes
    assert "'typical_p': 0.8" in codes
    assert "logit_bias={'7': -100.0, '9': 1.5}" in codes
    assert "'bad_words': ['never', 'mind']" in codes
    assert "Be brief." in codes


def test_several_answers_and_the_prompt_s_own_probabilities(ready_host, open_page):
    fake: FakeHost = ready_host(choose=scripted("Yes."))
    at = open_page("playground")
    at.text_input("seed").set_value("7")
    at.number_input("n").set_value(2)
    at.toggle("prompt_logprobs").set_value(True)
    at.text_input("stop_token_ids").set_value("46")
    at.run()
    say(at, "one")
    assert not at.exception
    shown = html_of(at)
    for part in ("Answer 1 of 2, the likeliest: what best_of returns", "Answer 2 of 2", "seed 7", "seed 8"):
        assert part in shown, part
    assert eventually(lambda: len(fake.worker.records.requests()) == 2)  # a record follows its last token
    asked = fake.worker.records.requests()
    assert [record.num_output_tokens for record in asked] == [4, 4]  # 46 is the full stop
    scored = re.search(r"prompt: perplexity [\d.]+ over ([\d,]+) tokens", shown)
    assert int(scored[1]) == asked[0].num_prompt_tokens - 1
    codes = "\n".join(block.value for block in at.code)
    for part in ('"n": 2', "'prompt_logprobs': 3", "'stop_token_ids': [46]"):
        assert part in codes, part
    say(at, "two")  # goes on with the first answer
    said = fake.worker.tokenizer.apply_chat_template(
        [{"role": "user", "content": "one"}, {"role": "assistant", "content": "Yes"}, {"role": "user", "content": "two"}]
    )  # fmt: skip
    assert eventually(lambda: len(fake.worker.records.requests()) == 4)
    assert fake.worker.records.requests()[-1].num_prompt_tokens == len(said)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("seed", "x1", "Seed must be a whole number"),
        ("min_tokens", 300, "min_tokens"),
        ("logit_bias", "5", "must read like"),
        ("logit_bias", "5: 200", "at most 100"),
        ("allowed_token_ids", "x", "Token ids must read like"),
    ],
)
def test_setting_that_cannot_be_used_is_told_and_nothing_is_sent(key, value, told, ready_host, open_page):
    ready_host()
    at = open_page("playground")
    widget = at.number_input(key) if key == "min_tokens" else at.text_input(key)
    widget.set_value(value).run()
    assert not at.exception
    assert any(told in error.value for error in at.error)
    assert at.chat_input[0].disabled


def test_prompt_that_is_too_long_is_refused_in_place(ready_host, open_page):
    fake: FakeHost = ready_host()
    at = say(open_page("playground"), "a" * 2000)
    assert not at.exception
    assert "The request was refused" in html_of(at)
    assert "512" in html_of(at)
    assert fake.worker.records.requests() == []
    say(at, "short")  # the refused turn is not part of the next prompt
    assert fake.worker.records.requests()[-1].num_prompt_tokens < 100


def test_step_failure_is_shown_with_the_answer(ready_host, open_page):
    fake: FakeHost = ready_host()
    fake.runner.fail_next(RuntimeError("a step broke"))
    at = say(open_page("playground"), "hello")
    assert not at.exception
    assert "The answer ended with an error" in html_of(at)
    assert "a step broke" in html_of(at)


@pytest.fixture
def slow_worker():
    worker, _ = make_worker(delay_s=0.02, choose=lambda _id, _index: ord("x"))
    worker.start()
    yield worker
    worker.close()


def test_stop_keeps_what_there_is_and_frees_the_blocks(slow_worker):
    answer = answer_of(slow_worker, LONG)
    looks = follow([answer], 0.05)
    while not answer.text:
        next(looks)
    answer.stop()
    assert not answer.running
    assert answer.completion.finish_reason is FinishReason.ABORT
    assert set(answer.text) == {"x"}
    assert 0 < answer.num_tokens < 400
    deadline = time.monotonic() + 5
    while (
        slow_worker.stats().num_free_blocks < slow_worker.stats().num_blocks and time.monotonic() < deadline
    ):
        time.sleep(0.02)
    assert slow_worker.stats().num_free_blocks == slow_worker.stats().num_blocks


def test_answer_that_is_stopped_before_it_was_submitted_never_runs(slow_worker):
    go_on = threading.Event()

    def late(_model: str) -> EngineWorker:
        assert go_on.wait(20)
        return slow_worker

    answer = ask(late, new_conversation(), {"m": VERSION}, HI, Request(LONG)).replies["m"].last
    answer.stop(wait_s=0.0)
    go_on.set()
    assert answer.wait(10)
    assert answer.completion.finish_reason is FinishReason.ABORT
    assert answer.num_tokens < 400


def test_following_never_waits_longer_than_its_interval(slow_worker):
    answers = [answer_of(slow_worker, LONG) for _ in range(2)]
    looks = follow(answers, 0.05)
    before = time.monotonic()
    for _ in range(4):
        next(looks)
    assert time.monotonic() - before < 2.0
    assert all(answer.running for answer in answers)
    answers[1].stop()
    assert list(looks) == []  # until one of them ends
    answers[0].stop()


def test_answer_that_nobody_looks_at_is_aborted(slow_worker):
    tokenizer = slow_worker.tokenizer

    def begin(_request_id: str) -> Begun:
        return Begun(slow_worker.submit(tokenizer.encode("hi"), LONG), tokenizer, OutputSyntax().parser())

    answer = Answer(begin, LONG, unattended_s=0.1)
    assert answer.wait(10)
    assert answer.completion.finish_reason is FinishReason.ABORT


def test_store_is_bounded_and_aborts_what_it_drops(slow_worker):
    store = Conversations(limit=2)
    first = new_conversation()
    answer = answer_of(slow_worker, LONG, first)
    store.keep(first)
    store.keep(new_conversation())
    assert store.get(first.id) is first
    for _ in range(2):
        store.keep(new_conversation())
    assert store.get(first.id) is None
    assert answer.wait(10)
    assert answer.completion.finish_reason is FinishReason.ABORT


def test_two_threads_may_follow_one_answer(slow_worker):
    answer = answer_of(slow_worker, LONG)
    threads = [threading.Thread(target=lambda: list(follow([answer], 0.01))) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    answer.stop()
    for thread in threads:
        thread.join(5)
    assert not any(thread.is_alive() for thread in threads)


def test_token_views_spell_the_text_and_name_the_alternatives(ready_host):
    fake: FakeHost = ready_host(choose=scripted("día"))
    answer = answer_of(fake.worker, GREEDY)
    assert answer.wait(10)
    views = answer.tokens()
    assert "".join(view.text for view in views) == answer.text == "día"
    assert all(len(view.alternatives) == 3 for view in views)
    assert views[-1].is_last
    assert views[-1].text == ""  # the end of the text
    assert "end</span>" in chat_message.finished(answer)
    assert "␣" in chat_message.visible(" a")


def test_stop_text_is_not_shown_as_said(ready_host):
    fake: FakeHost = ready_host(choose=scripted("one two three"))
    answer = answer_of(fake.worker, GREEDY.with_(stop=(" tw",)))
    assert answer.wait(10)
    assert answer.text == "one"
    assert "".join(view.text for view in answer.tokens()) == "one"
    assert "stop text" in chat_message.finished(answer)


def test_a_task_s_own_system_prompt_wins():
    conversation = new_conversation()
    task = ({"role": "system", "content": "theirs"}, {"role": "user", "content": "hi"})
    assert conversation.messages("m", "ours", then=task) == list(task)
    assert [m["content"] for m in conversation.messages("m", "ours", then=task[1:])] == ["ours", "hi"]
    assert conversation.messages("m", "ours") == []


def test_copied_code_takes_a_key_once_one_was_made(ready_host, open_page, tmp_path):
    host, settings = ready_host().host, Settings(home_dir=tmp_path)
    with open_store(tmp_path) as store:
        for needs_key in (False, True):
            resources.provide(host, settings=settings, store=store)  # also forgets what was read
            at = open_page("playground")
            say(at, "Hello")
            codes = "\n".join(block.value for block in at.code)
            assert ("OpenAI(" in codes, 'os.environ["QUIRE_API_KEY"]' in codes) == (True, needs_key)
            assert ("Bearer $QUIRE_API_KEY" in codes) == needs_key
            keys.create(store, "mine", [Right.INFER])


def test_resources_without_an_app_say_so():
    resources.provide(None)
    with pytest.raises(RuntimeError, match="inside the app"):
        resources.host()
