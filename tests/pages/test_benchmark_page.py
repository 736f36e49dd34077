"""The Benchmark page: nothing yet, running, the report of a run, beside an earlier one, and refusals."""

from __future__ import annotations

import pytest
from benchmark_world import save_benchmark
from page_world import html_of
from records_world import settle

from workbench.jobs import JobState
from workbench.ui import benchmark_result


def test_first_benchmark_is_the_preset_and_a_job(records, open_page):
    world = records(empty=True)
    at = settle(open_page("benchmark"))
    assert "No benchmark has run yet" in html_of(at)
    at.button("bench_first").click().run()
    assert not at.exception
    (job,) = world.jobs.list(kind="benchmark")
    assert job.device == "exclusive"
    assert (job.spec["rate"], job.spec["requests"]) == (2.0, 60)  # 30 seconds of arrivals
    assert job.spec["slo"] == {"ttft_ms": 200.0, "tpot_ms": 50.0}
    assert "Queued" in at.get("progress")[0].proto.text


def test_form_starts_what_was_typed_and_tells_it_as_code(records, open_page):
    world = records(empty=True)
    at = settle(open_page("benchmark"))
    at.number_input("concurrency").set_value(3)
    at.number_input("requests").set_value(9)
    at.number_input("output_tokens").set_value(7).run()
    at.button("bench_start").click().run()
    (job,) = world.jobs.list(kind="benchmark")
    assert (job.spec["concurrency"], job.spec["requests"], job.spec["output_tokens"]) == (3, 9, 7)
    codes = "\n".join(block.value for block in at.code)
    assert "quire bench run" in codes
    assert "--concurrency 3" in codes
    assert "quire notebook run benchmark" in codes


def test_running_benchmark_shows_figures_so_far_and_can_be_cancelled(records, open_page):
    world = records(empty=True)
    so_far = {
        "num_requests": 12,
        "num_failed": 0,
        "ttft_ms": {"p50": 21.0, "p95": 34.5},
        "tpot_ms": {"p50": 5.0, "p95": 6.0},
        "output_tokens_per_s": 321.0,
    }
    job = world.job(
        "benchmark",
        {"model": "fake-echo"},
        JobState.RUNNING,
        fraction=0.5,
        message="12 of 60 requests",
        partial={"figures": so_far},
    )
    at = settle(open_page("benchmark"))
    assert "12 of 60 requests" in at.get("progress")[0].proto.text
    shown = html_of(at)
    assert "34.5 ms" in shown
    assert "321" in shown
    at.button("bench_cancel").click().run()
    assert world.jobs.get(job.id).cancel_requested


def test_report_has_percentiles_distributions_and_the_share_that_kept_the_slo(records, open_page):
    world = records(empty=True)
    save_benchmark(world.settings, ttft_ms=20, tpot_ms=10, n=40)
    at = settle(open_page("benchmark"))
    shown = html_of(at)
    assert "median 39.5 ms" in shown  # TTFT 20 … 59
    assert "57.0 ms" in shown  # its p95
    assert "100 %" in shown  # all within the default SLO
    assert len(at.get("plotly_chart")) == 4
    at.number_input("slo_ttft").set_value(39.0).run()
    assert "50.0 %" in html_of(at)  # judged again, without another run
    assert "n = 40" in html_of(at)
    assert "float32" in html_of(at)


def test_two_runs_are_set_side_by_side_with_intervals(records, open_page):
    world = records(empty=True)
    save_benchmark(world.settings, ttft_ms=20, name="slow")
    save_benchmark(world.settings, ttft_ms=10, tpot_ms=10, name="fast")
    at = settle(open_page("benchmark"))
    other = [r for r in _ids(world) if r != at.selectbox("bench").value]
    at.session_state["against"] = other[0]
    settle(at)
    shown = html_of(at)
    assert "Beside the earlier run" in shown
    assert "✓ better" in shown
    assert "? not proven" in shown  # the time per token did not change
    assert "spec.name: slow → fast" not in shown  # a name is no condition


def _ids(world) -> list[str]:
    from workbench.bench import saved

    return [record.id for record in saved.listed(world.settings.home_dir)]


@pytest.mark.parametrize(
    ("state", "facts", "told"),
    [
        (JobState.FAILED, {"error": {"code": "server_unreachable", "message": "nothing answers", "remedy": "Start it."}}, "Start it."),
        (JobState.INTERRUPTED, {}, "was interrupted"),
        (JobState.CANCELLED, {}, "was cancelled"),
    ],
)  # fmt: skip
def test_benchmark_that_did_not_end_well_says_why(records, open_page, state, facts, told):
    world = records(empty=True)
    world.job("benchmark", {"model": "fake-echo"}, state, **facts)
    assert told in html_of(settle(open_page("benchmark")))


def test_own_run_is_shown_when_it_has_ended(records, open_page):
    world = records(empty=True)
    first = save_benchmark(world.settings, name="first")
    at = settle(open_page("benchmark"))
    assert at.selectbox("bench").value == first.id
    second = save_benchmark(world.settings, name="second")
    job = world.job("benchmark", {}, JobState.DONE, result={"id": second.id})
    at.session_state["bench_started"] = job.id
    settle(at)
    assert at.selectbox("bench").value == second.id


def test_what_a_run_was_bound_by_is_told_of_records_of_any_age():
    assert benchmark_result.bound_by({"share_of_limit": 0.2, "bound_by": "KV"}) == "bound by KV"
    assert benchmark_result.bound_by({"bound_by_memory_share": 0.8}) == "bound by memory for 80 %"
    assert benchmark_result.bound_by({}) == "of this device's limit"
