"""Overview's checklist, ticked from records; feedback from the Playground; running jobs in the bar of every page."""

from __future__ import annotations

import re

import pytest
from benchmark_world import save_benchmark
from page_world import html_of
from records_world import NAME, eventually, make_model, settle
from streamlit.testing.v1 import AppTest

from engine.sampling_params import SamplingParams
from workbench.jobs import JobState
from workbench.observe import feedback
from workbench.observe.request_log import RequestLog
from workbench.ui import resources
from workbench.ui.components import checklist

PAGES = ("overview", "playground", "engine", "benchmark", "versions", "compare", "fleet", "runs", "settings")


def ticked(at: AppTest) -> list[str]:
    """Titles of the steps that are done."""
    items = re.findall(r'<li class="(done)?">.*?<b>(.*?)</b>', html_of(at))
    return [title for done, title in items if done]


def until_ticked(at: AppTest, title: str) -> AppTest:
    def is_there() -> bool:
        resources.readings().forget("checklist", "registry")
        return title in ticked(at.run())

    assert eventually(is_there), ticked(at)
    return at


def test_fresh_home_has_nothing_ticked_and_shows_the_way(records, open_page):
    records(empty=True)
    at = settle(open_page("overview"))
    assert ticked(at) == []
    assert "0 of 6 done" in html_of(at)
    assert "**Next: ask the model something**" in [link.label for link in at.get("page_link")]


def test_setting_the_alias_for_the_first_time_is_no_promotion(records, open_page):
    records()
    at = settle(open_page("overview"))
    for _ in range(3):
        resources.readings().forget("checklist", "registry")
        at.run()
    assert ticked(at) == []


def test_each_record_ticks_its_own_step(records, open_page, tmp_path):
    world = records()
    at = settle(open_page("overview"))
    registry = resources.services().registry()
    with RequestLog(world.settings.home_dir) as log:
        world.host.worker().add_sink(log.sink("fake", "d"))
        world.host.worker().submit([1, 2, 3], SamplingParams(max_tokens=2, ignore_eos=True)).result(10)
        until_ticked(at, checklist.STEPS[0].title)
    save_benchmark(world.settings)
    until_ticked(at, checklist.STEPS[1].title)
    world.job("compare", {}, JobState.FAILED, error={"code": "x", "message": "no"})
    world.job("compare", {}, JobState.DONE, result={})
    until_ticked(at, checklist.STEPS[2].title)
    registry.promote(NAME, 2)
    until_ticked(at, checklist.STEPS[3].title)
    assert checklist.STEPS[4].title not in ticked(at)
    registry.rollback(NAME)
    until_ticked(at, checklist.STEPS[4].title)
    registry.register("mine", base=make_model(tmp_path / "mine", 42))
    until_ticked(at, checklist.STEPS[5].title)
    assert "First steps: all 6 done" in html_of(at)
    assert not any("Next:" in link.label for link in at.get("page_link"))
    world_again = settle(open_page("overview"))  # another session: the records say the same
    until_ticked(world_again, checklist.STEPS[5].title)
    assert len(ticked(world_again)) == 6


def test_whoever_comes_back_finds_the_step_ticked(records, open_page, monkeypatch):
    monkeypatch.setattr(
        checklist, "TTL_S", 3600.0
    )  # what was read when the page was opened first would do for an hour
    world = records()
    at = settle(open_page("overview"))
    assert ticked(at) == []
    with RequestLog(world.settings.home_dir) as log:
        world.host.worker().add_sink(log.sink("fake", "d"))
        world.host.worker().submit([1, 2, 3], SamplingParams(max_tokens=2, ignore_eos=True)).result(10)
    at = open_page("overview")
    assert eventually(lambda: checklist.STEPS[0].title in ticked(at.run()))


def test_failed_comparison_ticks_nothing(records, open_page):
    world = records()
    world.job("compare", {}, JobState.FAILED, error={"code": "x", "message": "no"})
    at = settle(open_page("overview"))
    for _ in range(3):
        resources.readings().forget("checklist")
        at.run()
    assert ticked(at) == []


def test_overview_says_when_registry_and_engine_differ(records, open_page):
    world = records()
    ref = f"{NAME}@champion"
    world.host.follow(ref)
    world.host.note(ref, 1)
    world.host.serve(ref, 1)
    world.host.note(ref, 3)
    assert "registry v3, serving v1" in html_of(settle(open_page("overview")))
    world.host.note(ref, 3, "it does not fit")
    assert "registry v3, serving v1: it does not fit" in html_of(settle(open_page("overview")))


def ask(at: AppTest, text: str) -> AppTest:
    return settle(at.chat_input[0].set_value(text).run())


def test_thumb_score_comment_and_correction_are_kept_and_shown_newest_first(records, open_page):
    world = records()
    at = ask(open_page("playground"), "hello")
    request_id = world.host.worker().records.requests()[-1].request_id
    at.feedback(f"thumbs_{request_id}").set_value(1).run()
    assert [(f.kind, f.value, f.request_id) for f in feedback.list_feedback(world.store)] == [
        ("thumbs", "up", request_id)
    ]
    at.session_state[f"more_{request_id}"] = True  # the popover's form is made when it opens
    at.run()
    at.feedback(f"score_{request_id}").set_value(3)
    at.text_area(f"comment_{request_id}").set_value("short <b>and</b> right")
    at.text_area(f"correction_{request_id}").set_value("Good day.")
    at.button(f"keep_{request_id}").click().run()
    assert not at.exception
    kept = {f.kind: f for f in feedback.list_feedback(world.store)}
    assert kept["score"].value == 4.0
    assert kept["comment"].comment == "short <b>and</b> right"
    assert kept["correction"].correction == "Good day."
    at.feedback(f"thumbs_{request_id}").set_value(0).run()
    assert feedback.list_feedback(world.store)[0].value == "down"  # one person, one thumb
    assert len(feedback.list_feedback(world.store)) == 4
    shown = html_of(settle(open_page("overview")))
    assert "short &lt;b&gt;and&lt;/b&gt; right" in shown
    assert shown.index("down") < shown.index("Good day.")
    assert "0 of 1 thumbs up" in shown


def test_feedback_is_there_again_after_a_reload(records, open_page):
    world = records()
    at = ask(open_page("playground"), "hello")
    request_id = world.host.worker().records.requests()[-1].request_id
    feedback.record(world.store, request_id, "thumbs", "down")
    again = open_page("playground")
    again.query_params["chat"] = at.query_params["chat"]
    again.run()
    assert again.feedback(f"thumbs_{request_id}").value == 0
    assert len(feedback.list_feedback(world.store)) == 1  # looking at it is no vote


@pytest.mark.parametrize("page", PAGES)
def test_running_job_is_in_the_bar_of_every_page_and_can_be_cancelled_there(page, records, open_page):
    world = records()
    job = world.job(
        "finetune", {}, JobState.RUNNING, title="Fine-tune of x", fraction=0.25, message="step 10 of 40"
    )
    at = settle(open_page(page))
    assert "Fine-tune of x 25%" in html_of(at)
    at.button(f"bar_cancel_{job.id}").click().run()
    assert world.jobs.get(job.id).cancel_requested
    assert not at.exception


def test_picker_offers_every_resident_and_a_followed_alias_stays_chosen(records, open_page):
    world = records()
    ref = f"{NAME}@champion"
    world.host.follow(ref)
    world.host.note(ref, 1)
    world.host.serve(ref, 1)
    world.host.load(f"{NAME}/3")
    at = settle(open_page("playground"))
    options = at.selectbox("model").options
    assert f"{NAME} @champion" in options
    assert any(o.startswith(f"{NAME} v3") for o in options)
    at.selectbox("model").set_value(ref).run()
    ask(at, "hello")
    assert len(world.host.worker(f"{NAME}/1").records.requests()) == 1
    world.host.note(ref, 2)
    world.host.serve(ref, 2)
    settle(at)
    assert at.selectbox("model").value == ref
    # a label that changed would lose the choice of an open browser
    assert sorted(at.selectbox("model").options) == sorted(options)
    assert f"<b>{NAME} v2</b>" in html_of(at)
    ask(at, "hello again")
    assert len(world.host.worker(f"{NAME}/2").records.requests()) == 1
