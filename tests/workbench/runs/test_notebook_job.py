"""Notebooks as jobs: refused before they run, run in a kernel of their own, logged to MLflow, errors kept with the cell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import pytest

from workbench.jobs import Job, Jobs, JobSpecError, JobState
from workbench.jobs.process_id import ProcessId
from workbench.jobs.runner import JobRunner
from workbench.runs.errors import NotebookFormatError, NotebookParameterError, UnknownNotebookError
from workbench.runs.notebooks import discover, find
from workbench.runs.record import find_record, record
from workbench.settings import Settings
from workbench.store import open_store

MakeNotebook = Callable[..., Path]
ROOT = Path(__file__).resolve().parents[3]
PROBE = "n: int = 3  # numbers to add\nnote: str | None = None  # shown"
RECORD = "from workbench.runs.record import record\nrecord('probe', {'total': sum(range(n)), 'note': note});"


def write(folder: Path, name: str, parameters: str, *cells: str) -> None:
    """A notebook with a parameters cell and code cells, without metadata about its language."""
    folder.mkdir(parents=True, exist_ok=True)
    notebook = nbformat.v4.new_notebook()
    tagged = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    notebook.cells = [tagged, *(nbformat.v4.new_code_cell(cell) for cell in cells)]
    nbformat.write(notebook, folder / f"{name}.ipynb")


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


THREE_RUNS = """
import json, os
from workbench import settings, tracking
from workbench.jobs import Jobs
from workbench.store import open_store

home = settings.load()
with open_store(home.home_dir) as store:
    jobs = Jobs(store, home.home_dir)
    done = jobs.run_here(jobs.submit("notebook", {"notebook": "probe", "parameters": {"n": 5}}, title="Probe run").id)
    failed = jobs.run_here(jobs.submit("notebook", {"notebook": "failing"}).id)
    client = tracking.client(home)
    for job in (done, failed):
        run = client.get_run((job.result or job.partial)["run_id"])
        print(json.dumps({
            "job": job.id, "status": run.info.status, "params": run.data.params, "metrics": run.data.metrics,
            "tag": run.data.tags["quire.job"], "name": run.info.run_name,
            "artifacts": sorted(each.path for each in client.list_artifacts(run.info.run_id)),
            "experiment": client.get_experiment(run.info.experiment_id).name,
        }))
    os.environ |= {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9/none", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    down = jobs.run_here(jobs.submit("notebook", {"notebook": "probe"}).id)
    print(json.dumps({"job": down.id}))
"""


@dataclass
class Run:
    job: Job
    tracked: dict[str, Any]


@dataclass
class ThreeRuns:
    """One that is done, one with a cell that raises, one while MLflow is down."""

    done: Run
    failed: Run
    down: Run
    errors: str  # what the process wrote beside its results


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> ThreeRuns:
    """Three runs in one process of its own, which pays for the imports once."""
    home = tmp_path_factory.mktemp("three") / "home"
    write(home / "notebooks", "probe", PROBE, "print('adding', n)", RECORD)
    write(home / "notebooks", "failing", "n: int = 3  # numbers", "kept = n", "kept / 0", "print('never')")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("QUIRE_", "MLFLOW_"))}
    own = {
        "HOME_DIR": str(home),
        "PYTHONPATH": str(ROOT),
        "MLFLOW_PORT": "9",
    }  # nothing listens: the file is used
    ended = subprocess.run(
        [sys.executable, "-c", THREE_RUNS], env=clean | own, capture_output=True, text=True, timeout=280, check=False
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    told = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    with open_store(home) as store:
        runs = [Run(Jobs(store, home).get(each["job"]), each) for each in told]
    return ThreeRuns(*runs, errors=ended.stderr)


def test_a_run_is_executed_recorded_and_logged(three: ThreeRuns) -> None:
    job, tracked = three.done.job, three.done.tracked
    assert job.state is JobState.DONE
    assert job.result is not None
    assert job.result["record"] == {"kind": "probe", "values": {"total": 10, "note": None}}
    assert job.result["parameters"] == {"n": 5, "note": None}
    found = find_record(json.loads(Path(job.result["executed"]).read_text()))
    assert found is not None
    assert found.values["total"] == 10
    assert not list(Path(job.result["executed"]).parent.glob("*.part.ipynb"))
    assert "adding 5" in three.errors, "what a cell prints is seen while it runs"
    assert (tracked["status"], tracked["experiment"], tracked["name"]) == (
        "FINISHED",
        "quire/runs",
        "Probe run",
    )
    assert tracked["params"] == {"n": "5", "note": "None"}
    assert tracked["metrics"]["total"] == 10
    assert tracked["tag"] == job.id
    assert tracked["artifacts"] == ["probe.ipynb", "record.json"]


def test_a_cell_that_raises_is_kept_with_its_error(three: ThreeRuns) -> None:
    job, tracked = three.failed.job, three.failed.tracked
    assert job.state is JobState.FAILED
    assert job.error is not None
    assert (job.error["code"], job.error["value"]["error"]) == ("notebook_failed", "ZeroDivisionError")
    assert job.error["value"]["source"] == "kept / 0"
    assert job.partial is not None
    assert job.partial["failed_cell"] == job.error["value"]
    cells = json.loads(Path(job.partial["executed"]).read_text())["cells"]
    assert any("ZeroDivisionError" in str(cell.get("outputs")) for cell in cells)
    assert "Traceback" not in three.errors.partition("NotebookFailedError")[0], "a typed error is one line"
    assert (tracked["status"], tracked["artifacts"]) == ("FAILED", ["failing.ipynb"])


def test_mlflow_down_is_said_before_the_notebook_runs(three: ThreeRuns) -> None:
    job = three.down.job
    assert job.state is JobState.FAILED
    assert job.error is not None
    assert job.error["type"] == "RegistryUnreachableError"
    assert not list((Path(job.log_path).parent / job.id).glob("*.ipynb")), "no cell ran"


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


def test_a_record_outside_a_notebook_is_returned() -> None:
    made = record("probe", {"total": 3, "name": "x", "ok": True, "bad": float("inf")})
    assert made.values == {"total": 3, "name": "x", "ok": True, "bad": None}
    assert made.metrics() == {"total": 3.0}
    assert find_record({"cells": [{"outputs": [{"data": {"text/plain": "x"}}]}]}) is None
