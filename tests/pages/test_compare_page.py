"""The Compare page: nothing yet, running, verdicts with their reasons, examples, what is done about it, and failures."""

from __future__ import annotations

import pytest
from comparison_world import compare_result, pair_rows
from page_world import html_of
from records_world import NAME, Records, settle
from streamlit.testing.v1 import AppTest

from workbench.jobs import JobState

SPEC = {"a": f"{NAME}/1", "b": f"{NAME}/2", "dataset": NAME, "seed": 0, "speed": False, "gate": None}


@pytest.fixture
def done(records, open_page):
    """A world with one finished comparison of these outcomes, and the page that shows it."""

    def make(wins: int = 20, losses: int = 2) -> tuple[Records, AppTest]:
        world = records()
        result = compare_result(world.settings, SPEC["a"], SPEC["b"], pair_rows(wins=wins, losses=losses))
        world.job("compare", SPEC, JobState.DONE, title="v1 against v2", result=result)
        return world, settle(open_page("compare"))

    return make


def test_the_report_shows_divergence_where_it_was_measured(records, open_page):
    world = records()
    result = compare_result(world.settings, SPEC["a"], SPEC["b"], pair_rows(wins=20, losses=2))
    apart = {
        "mean_kl": 0.01234, "low": 0.01, "high": 0.0151, "max_kl": 2.5, "same_top": 0.975, "n": 44, "num_tokens": 1234,
        "worst": [["t-07", 0.2]],
    }  # fmt: skip
    world.job("compare", SPEC, JobState.DONE, title="v1 against v2", result={**result, "divergence": apart})
    shown = html_of(settle(open_page("compare")))
    for told in (
        "Token distributions",
        "0.0123",
        "0.0100 … 0.0151",
        "2.50",
        "97.5%",
        "1,234 tokens",
        "t-07 (0.200)",
    ):
        assert told in shown, told


def test_divergence_is_measured_when_it_is_asked_for(records, open_page):
    world = records()
    at = settle(open_page("compare"))
    at.toggle("divergence").set_value(True).run()
    at.button("compare_start").click().run()
    assert not at.exception
    (job,) = world.jobs.list(kind="compare")
    assert job.spec["divergence"] is True


def test_without_versions_it_says_what_is_missing(records, open_page):
    records(empty=True)
    at = settle(open_page("compare"))
    assert "Nothing to compare yet" in html_of(at)


def test_first_comparison_is_proposed_and_started_as_a_job(records, open_page):
    world = records()
    at = settle(open_page("compare"))
    assert f"{NAME}/1 against {NAME}/2 on {NAME}" in html_of(at)
    at.button("compare_first").click().run()
    assert not at.exception
    (job,) = world.jobs.list(kind="compare")
    assert (job.spec["a"], job.spec["b"], job.spec["dataset"]) == (f"{NAME}/1", f"{NAME}/2", NAME)
    assert job.device == "exclusive"
    assert "Queued" in at.get("progress")[0].proto.text


def test_running_comparison_shows_progress_time_left_and_what_it_knows(records, open_page):
    world = records()
    partial = {"means": {"a": {"exact_match": 0.81}}, "runs": {}}
    job = world.job(
        "compare",
        SPEC,
        JobState.RUNNING,
        fraction=0.4,
        message="ticket-extractor/2: 80 of 400 answers",
        partial=partial,
    )
    at = settle(open_page("compare"))
    told = at.get("progress")[0].proto.text
    assert "40%" in told
    assert "80 of 400 answers" in told
    assert "left" in told
    assert "0.810" in html_of(at)
    at.button("compare_cancel").click().run()
    assert world.jobs.get(job.id).cancel_requested


def test_better_version_is_promoted_from_its_verdict(done):
    world, at = done(wins=20, losses=2)
    shown = html_of(at)
    assert "✓ Promote" in shown
    assert "✓ better" in shown
    assert "+30.0 % [" in shown
    assert "n = 60" in shown
    assert "slice=calm" in shown
    assert 'class="ok"' in shown  # a reason that was kept
    settle(at.button("compare_promote").click().run())
    registry = _registry(world)
    assert registry.get(NAME, "@champion").ref.version == 2
    move = registry.history(NAME)[-1]
    assert "comparison compare-0: ✓ Promote" in move.reason
    settle(at.button("compare_rollback").click().run())
    assert registry.get(NAME, "@champion").ref.version == 1


@pytest.mark.parametrize(("wins", "losses", "verdict"), [(5, 3, "? Not proven"), (1, 25, "✕ Refuse")])
def test_other_verdicts_say_so_and_warn_before_promoting(done, wins, losses, verdict):
    _, at = done(wins=wins, losses=losses)
    assert verdict in html_of(at)
    assert f"The verdict was **{verdict}**" in "\n".join(m.value for m in at.markdown)


def test_examples_are_browsed_by_outcome_and_slice(done):
    _, at = done(wins=20, losses=2)
    shown = html_of(at)
    assert "B wins: 20, B loses: 2, ties: 38, n = 60" in shown
    assert "t-000" in shown
    assert "Message 0 about &lt;b&gt;P-0&lt;/b&gt;" in shown  # escaped
    assert "<mark>?</mark>" in shown  # A said P-? where P-0 was expected
    at.button("example_next").click().run()
    assert "t-001" in html_of(at)
    at.segmented_control("outcome").set_value("loss").run()
    assert "t-020" in html_of(at)
    at.button("example_next").click().run()
    assert "t-021" in html_of(at)
    assert at.button("example_next").disabled
    at.selectbox("slice").set_value("slice=calm").run()
    assert "t-020" in html_of(at)
    assert at.button("example_next").disabled
    assert not at.exception


@pytest.mark.parametrize(
    ("state", "facts", "told"),
    [
        (JobState.FAILED, {"error": {"code": "missing_weights", "message": "no folder holds them", "remedy": "Put it back.", "value": "abc"}},
         ("failed", "no folder holds them", "Put it back.", "missing_weights")),
        (JobState.CANCELLED, {}, ("was cancelled",)),
        (JobState.INTERRUPTED, {}, ("was interrupted", "start it again")),
    ],
)  # fmt: skip
def test_comparison_that_did_not_end_well_says_why(records, open_page, state, facts, told):
    world = records()
    world.job("compare", SPEC, state, title="v1 against v2", **facts)
    shown = html_of(settle(open_page("compare")))
    for part in told:
        assert part in shown
    assert "Traceback" not in shown


def test_dataset_that_is_none_is_refused_before_anything_starts(records, open_page):
    world = records()
    folder = world.settings.home_dir / "datasets"
    folder.mkdir()
    (folder / "broken.jsonl").write_text('{"id": "1"}\n')
    at = settle(open_page("compare"))
    at.selectbox("dataset").set_value("broken").run()
    at.button("compare_start").click().run()
    shown = html_of(at)
    assert "It was not started" in shown
    assert "lacks the field" in shown
    assert world.jobs.list(kind="compare") == []


def _registry(world: Records):
    from workbench.versions.registry import Registry

    return Registry(world.settings)
