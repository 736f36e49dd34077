"""The Runs page: forms from a notebook's parameters, runs, schedules, output, errors, and every job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from page_world import html_of
from records_world import Records, settle

from workbench.jobs import JobState

PARAMETERS = """\
max_tokens: int = 64  # output tokens of a request
rate: float = 1.5  # requests a second
name: str = "x"
note: str | None = None  # shown beside the run
fast: bool = False
"""


def notebook_file(folder: Path, name: str, cells: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    path = folder / f"{name}.ipynb"
    path.write_text(json.dumps(content))
    return path


def code(source: str, *outputs: dict, tags: tuple[str, ...] = ()) -> dict:
    return {
        "cell_type": "code",
        "metadata": {"tags": list(tags)},
        "source": source,
        "outputs": list(outputs),
        "execution_count": None,
    }


@pytest.fixture
def world(records) -> Records:
    made = records(empty=True)
    cells = [
        {"cell_type": "markdown", "metadata": {}, "source": "# Count things\n\nCounts them."},
        code(PARAMETERS, tags=("parameters",)),
    ]
    notebook_file(made.settings.home_dir / "notebooks", "a_count", cells)
    return made


def test_form_is_made_of_the_parameters_and_runs_as_a_job(world, open_page):
    at = settle(open_page("runs"))
    assert at.selectbox("notebook").value == "a_count"
    assert "Counts them." in html_of(at)
    assert at.number_input("a_count.max_tokens").value == 64
    assert at.number_input("a_count.max_tokens").help == "output tokens of a request"
    at.number_input("a_count.max_tokens").set_value(5)
    at.text_input("a_count.rate").set_value("2.5")
    at.toggle("a_count.fast").set_value(True).run()
    at.button("notebook_run").click().run()
    assert not at.exception
    (job,) = world.jobs.list(kind="notebook")
    assert job.spec == {
        "notebook": "a_count",
        "parameters": {"max_tokens": 5, "rate": 2.5, "name": "x", "note": None, "fast": True},
    }
    assert "quire notebook run a_count -p max_tokens=5 -p rate=2.5 -p fast=True" in "\n".join(
        c.value for c in at.code
    )


def test_value_that_is_none_cannot_be_run(world, open_page):
    at = settle(open_page("runs"))
    at.text_input("a_count.rate").set_value("fast").run()
    assert "rate must be a number, got 'fast'." in at.error[0].value
    assert at.button("notebook_run").disabled


def test_notebook_without_parameters_cell_says_what_to_do(world, open_page):
    notebook_file(world.settings.home_dir / "notebooks", "a_broken", [code("x = 1")])
    shown = html_of(settle(open_page("runs")))
    assert "a_broken cannot be run" in shown
    assert "Give exactly one cell the tag" in shown


def test_running_notebook_shows_its_output_live(world, open_page):
    job = world.job(
        "notebook", {"notebook": "a_count", "parameters": {}}, JobState.RUNNING, message="cell 2 of 5"
    )
    log = Path(job.log_path)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("counting <one>\n")
    at = settle(open_page("runs"))
    assert "cell 2 of 5" in at.get("progress")[0].proto.text
    assert "counting &lt;one&gt;" in html_of(at)
    log.write_text("counting <one>\ncounting two\n")
    assert "counting two" in html_of(at.run())


def test_failed_notebook_shows_its_error_and_what_it_had_said(world, open_page, tmp_path):
    stream = {"output_type": "stream", "name": "stdout", "text": "half way <b>\n"}
    error = {
        "output_type": "error",
        "ename": "ValueError",
        "evalue": "no",
        "traceback": ["\x1b[31mValueError\x1b[0m: no"],
    }
    html = {
        "output_type": "display_data",
        "data": {"text/html": "<script>alert(1)</script>", "text/plain": "a table"},
        "metadata": {},
    }
    executed = notebook_file(
        tmp_path, "executed", [code("print(1)", stream, html), code("raise ValueError", error)]
    )
    failure = {
        "code": "notebook_failed",
        "message": "cell 1 of 'a_count' raised ValueError: no",
        "remedy": "Fix its cause.",
    }
    world.job(
        "notebook", {"notebook": "a_count", "parameters": {}}, JobState.FAILED, error=failure,
        partial={"executed": str(executed)},
    )  # fmt: skip
    shown = html_of(settle(open_page("runs")))
    for part in (
        "raised ValueError: no",
        "Fix its cause.",
        "half way &lt;b&gt;",
        "a table",
        "Executed notebook",
        ">ValueError: no<",
    ):
        assert part in shown, part
    assert "<script" not in shown
    assert "\x1b[" not in shown


def test_schedule_is_added_paused_and_removed(world, open_page):
    at = settle(open_page("runs"))
    at.number_input("a_count.max_tokens").set_value(5)
    at.text_input("schedule_name").set_value("nightly count")
    at.text_input("cron").set_value("0 3 * * *").run()
    at.button("schedule_add").click().run()
    assert "✓ nightly count: next in" in html_of(at)
    at.segmented_control("view").set_value("Schedules").run()
    shown = html_of(at)
    for part in ("nightly count", "a_count", "max_tokens = 5", "next in", "No time has come yet"):
        assert part in shown, part
    from workbench.runs.schedules import Schedules

    schedules = Schedules(world.store, world.settings.home_dir)
    (found,) = schedules.list()
    at.button(f"enable_{found.id}").click().run()
    assert not schedules.list()[0].enabled
    assert "paused" in html_of(at)
    at.button(f"remove_{found.id}").click().run()
    assert schedules.list() == []
    assert "Nothing runs by itself yet" in html_of(at)


@pytest.mark.parametrize(
    ("kind", "key", "value", "told"),
    [
        ("Once", "at", "2001-01-01T00:00:00+00:00", "is over"),
        ("Cron line", "cron", "61 * * * *", "It was not scheduled"),
    ],
)
def test_schedule_that_cannot_be_is_refused(world, open_page, kind, key, value, told):
    at = settle(open_page("runs"))
    at.segmented_control("when").set_value(kind).run()
    at.text_input(key).set_value(value).run()
    at.button("schedule_add").click().run()
    assert told in html_of(at)
    from workbench.runs.schedules import Schedules

    assert Schedules(world.store, world.settings.home_dir).list() == []


def test_jobs_are_listed_with_state_and_can_be_cancelled(world, open_page):
    running = world.job(
        "benchmark",
        {"model": "x"},
        JobState.RUNNING,
        title="Benchmark of x",
        fraction=0.3,
        message="3 of 9 requests",
    )
    world.job(
        "compare", {}, JobState.FAILED, title="v1 against v2", error={"code": "x", "message": "it broke"}
    )
    at = settle(open_page("runs"))
    at.segmented_control("view").set_value("Jobs").run()
    shown = html_of(at)
    for part in ("Benchmark of x", "30% · 3 of 9 requests", "running", "v1 against v2", "failed"):
        assert part in shown, part
    at.button(f"cancel_{running.id}").click().run()
    assert world.jobs.get(running.id).cancel_requested
    at.session_state["job"] = "compare-1"
    assert "it broke" in html_of(at.run())


def test_empty_pages_say_how_to_fill_them(records, open_page):
    records(empty=True)
    at = settle(open_page("runs"))
    at.segmented_control("view").set_value("Jobs").run()
    assert "No job has run yet" in html_of(at)
