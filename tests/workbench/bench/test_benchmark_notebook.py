"""The benchmark notebook, run headless as a Job of the app: its record is what the page reads of the same benchmark."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench_world import ROOT

from workbench.bench import saved
from workbench.jobs import Jobs, JobState
from workbench.store import open_store

NOTEBOOK = ROOT / "notebooks" / "benchmark.ipynb"


@pytest.mark.full
def test_its_figures_are_those_of_the_saved_benchmark(app):
    parameters = {
        "requests": 8,
        "concurrency": 2,
        "input_tokens": 40,
        "output_tokens": 6,
        "name": "from a notebook",
    }
    with open_store(app.home_dir) as store:
        jobs = Jobs(store, app.home_dir)
        job = jobs.wait(jobs.submit("notebook", {"notebook": "benchmark", "parameters": parameters}).id, 170)
        assert job.state is JobState.DONE, (job.error, Path(job.log_path).read_text()[-3000:])
        assert job.result is not None
        values = job.result["record"]["values"]
        record, table = saved.load(app.home_dir, values["id"])
        assert record.title == "from a notebook"
        assert {name: values[name] for name in record.figures} == record.figures
        assert values["ttft_ms_p95"] == record.figures["ttft_ms"]["p95"]
        assert values["mlflow"] == record.mlflow
        assert len(table) == 8


def test_it_is_committed_without_outputs():
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in cells)
