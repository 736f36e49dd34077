"""The job kind "finetune": trains with progress, registers with lineage, goes on after being stopped, refuses bad specs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from workbench import tracking
from workbench.jobs import Jobs, JobState
from workbench.settings import Settings
from workbench.store import open_store
from workbench.versions.errors import FinetuneConfigError
from workbench.versions.finetune_job import check
from workbench.versions.registry import Registry
from workbench.versions.training_data import JsonlData


@pytest.fixture
def spec(tiny_model: Path, data: JsonlData) -> dict[str, Any]:
    return {
        "name": "mine", "base": str(tiny_model), "data": {"kind": "jsonl", "path": str(data.path)}, "rank": 4,
        "alpha": 8.0, "steps": 4, "batch_tokens": 64, "warmup_steps": 1, "peak_lr": 0.01, "device": "cpu",
    }  # fmt: skip


def test_it_ends_with_a_registered_version(
    settings: Settings, spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME_DIR", str(settings.home_dir))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(settings.mlflow_tracking_uri))
    jobs = Jobs(open_store(settings.home_dir), settings.home_dir)
    told: list[str] = []
    job = jobs.submit("finetune", spec, device="none")
    done = jobs.run_here(job.id, lambda fraction, message: told.append(message))
    assert done.state is JobState.DONE, done.error
    assert done.result is not None
    assert any(message.startswith("step 4 of 4") for message in told)
    info = Registry(settings).get("mine", 1)
    assert done.result["version"] == "mine/1"
    assert done.result["digest"] == info.ref.digest
    run = tracking.client(settings).get_run(info.lineage["run_id"])
    assert run.data.params["rank"] == "4"
    assert run.data.metrics["final_loss"] == done.result["training"]["final_loss"]


@pytest.mark.parametrize(
    "change",
    [{"name": ""}, {"nope": 1}, {"steps": "many"}, {"steps": True}, {"data": 3}, {"data": {"kind": "csv"}}],
)
def test_bad_specs_are_refused_before_any_work(spec: dict[str, Any], change: dict[str, Any]) -> None:
    check(spec)
    with pytest.raises(FinetuneConfigError):
        check({**spec, **change})
