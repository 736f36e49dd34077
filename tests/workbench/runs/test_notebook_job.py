"""Notebooks as jobs: refused before they run, run in a kernel of their own, logged to MLflow, errors kept with the cell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from workbench.jobs import Jobs, JobSpecError, JobState
from workbench.jobs.process_id import ProcessId
from workbench.jobs.runner import JobRunner
from workbench.runs.errors import NotebookFormatError, NotebookParameterError, UnknownNotebookError
from workbench.runs.notebooks import discover, find
from workbench.runs.record import find_record, record
from workbench.settings import Settings

MakeNotebook = Callable[..., Path]


def test_notebooks_of_the_project_and_of_the_user_are_found(
    settings: Settings, make_notebook: MakeNotebook
) -> None:
    make_notebook("broken", "x = 1")
    found = {each.name: each for each in discover(settings)}
    assert found["nightly_gate"].bundled
    assert not found["probe"].bundled
    assert (found["probe"].title, found["probe"].description) == ("About probe", "What it is for.")
    assert [each.name for each in found["probe"].parameters] == ["n", "note"]
    assert isinstance(found["broken"].error, NotebookFormatError)
    with pytest.raises(NotebookFormatError, match=r"broken\.ipynb"):
        find("broken", settings)
    with pytest.raises(UnknownNotebookError, match="nightly_gate"):
        find("nothing", settings)


def test_a_file_that_is_no_notebook_is_listed_with_its_error(settings: Settings, home: Path) -> None:
    (home / "notebooks" / "bad.ipynb").write_text("{")
    (home / "notebooks" / "none.ipynb").write_text(
        '{"cells": [], "nbformat": 4, "nbformat_minor": 5, "metadata": {}}'
    )
    found = {each.name: each for each in discover(settings)}
    assert isinstance(found["bad"].error, NotebookFormatError)
    assert "0 parameters cells" in str(found["none"].error)


@pytest.mark.parametrize(
    ("spec", "error"),
    [
        ({"notebook": "nothing"}, UnknownNotebookError),
        ({"notebook": "../probe"}, UnknownNotebookError),
        ({"notebook": "probe", "parameters": {"m": 1}}, NotebookParameterError),
        ({"notebook": "probe", "parameters": {"n": "1"}}, NotebookParameterError),
        ({"notebook": "probe", "parameters": [1]}, JobSpecError),
        ({"notebook": "probe", "params": {}}, JobSpecError),
        ({}, JobSpecError),
    ],
)
def test_bad_input_is_refused_before_the_run(
    jobs: Jobs, spec: dict[str, object], error: type[Exception]
) -> None:
    with pytest.raises(error):
        jobs.submit("notebook", spec)
    assert jobs.list() == []


def test_a_run_is_executed_recorded_and_logged(jobs: Jobs, home: Path, settings: Settings) -> None:
    """As `quire notebook run` does it, in a process of its own: importing MLflow here would cost every other test."""
    job = jobs.submit("notebook", {"notebook": "probe", "parameters": {"n": 5}}, title="Probe run")
    done = subprocess.run(
        [sys.executable, "-m", "workbench.jobs", "run", job.id], env=os.environ.copy(), capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "adding 5" in done.stderr, "what a cell prints is seen while it runs"
    ended = jobs.get(job.id)
    assert ended.state is JobState.DONE
    assert ended.result is not None
    assert ended.result["record"] == {"kind": "probe", "values": {"total": 10, "note": None}}
    assert ended.result["parameters"] == {"n": 5, "note": None}
    executed = json.loads(Path(ended.result["executed"]).read_text())
    found = find_record(executed)
    assert found is not None
    assert found.values["total"] == 10
    assert not list((home / "jobs" / job.id).glob("*.part.ipynb"))
    check = (
        "import sys; from workbench import settings, tracking; s = settings.load(); c = tracking.client(s);"
        "r = c.get_run(sys.argv[1]); print(r.info.status, r.data.params, r.data.metrics['total'], r.data.tags['quire.job'],"
        "sorted(a.path for a in c.list_artifacts(sys.argv[1])), c.get_experiment(r.info.experiment_id).name)"
    )
    told = subprocess.run(
        [sys.executable, "-c", check, ended.result["run_id"]], env=os.environ.copy(), capture_output=True, text=True,
        check=True, timeout=120,
    ).stdout.strip()  # fmt: skip
    assert told.splitlines()[-1] == (
        f"FINISHED {{'n': '5', 'note': 'None'}} 10.0 {job.id} ['probe.ipynb', 'record.json'] quire/runs"
    )


def test_a_cell_that_raises_is_kept_with_its_error(
    jobs: Jobs, settings: Settings, make_notebook: MakeNotebook
) -> None:
    make_notebook("failing", "n: int = 3  # numbers", "kept = n", "kept / 0", "print('never')")
    runner = JobRunner(jobs, settings)
    runner.start()
    try:
        job = jobs.wait(jobs.submit("notebook", {"notebook": "failing"}).id, 240)
    finally:
        runner.close()
    assert job.state is JobState.FAILED
    assert job.error is not None
    assert (job.error["code"], job.error["value"]["error"]) == ("notebook_failed", "ZeroDivisionError")
    assert job.error["value"]["source"] == "kept / 0"
    assert job.partial is not None
    assert job.partial["failed_cell"] == job.error["value"]
    cells = json.loads(Path(job.partial["executed"]).read_text())["cells"]
    assert any("ZeroDivisionError" in str(cell.get("outputs")) for cell in cells)
    assert job.partial["run_id"], "the run is in MLflow, too"


def test_cancel_ends_a_cell_that_runs_and_its_kernel(
    jobs: Jobs, settings: Settings, make_notebook: MakeNotebook, home: Path, eventually: Callable[..., bool]
) -> None:
    make_notebook(
        "slow", "seconds: float = 600.0  # s",
        "import os, pathlib, time; pathlib.Path(os.environ['HOME_DIR'], 'kernel').write_text(str(os.getpid()))",
        "time.sleep(seconds)",
    )  # fmt: skip
    runner = JobRunner(jobs, settings)
    runner.start()
    try:
        job = jobs.submit("notebook", {"notebook": "slow"})
        assert eventually(lambda: "time.sleep" in jobs.get(job.id).message, 120)
        kernel = ProcessId.of(int((home / "kernel").read_text()))
        assert kernel.is_alive()
        jobs.cancel(job.id)
        ended = jobs.wait(job.id, 20)
    finally:
        runner.close()
    assert ended.state is JobState.CANCELLED
    assert eventually(lambda: not kernel.is_alive(), 20)
    assert (home / "jobs" / job.id / "slow.ipynb").is_file(), "the cells that ran are kept"


def test_mlflow_down_is_said_before_the_notebook_runs(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9/none")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    job = jobs.submit("notebook", {"notebook": "probe"})
    subprocess.run(
        [sys.executable, "-m", "workbench.jobs", "run", job.id], env=os.environ.copy(), capture_output=True, check=False,
        timeout=240,
    )  # fmt: skip
    ended = jobs.get(job.id)
    assert ended.state is JobState.FAILED
    assert ended.error is not None
    assert ended.error["type"] == "RegistryUnreachableError"
    assert not list((home / "jobs" / job.id).glob("*.ipynb")), "no cell ran"


def test_a_record_outside_a_notebook_is_returned() -> None:
    made = record("probe", {"total": 3, "name": "x", "ok": True, "bad": float("inf")})
    assert made.values == {"total": 3, "name": "x", "ok": True, "bad": None}
    assert made.metrics() == {"total": 3.0}
    assert find_record({"cells": [{"outputs": [{"data": {"text/plain": "x"}}]}]}) is None
