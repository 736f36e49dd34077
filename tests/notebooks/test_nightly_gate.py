"""The nightly gate as it runs by itself: `quire up` with the bundled versions, a one-minute schedule, and nobody watching."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from workbench.jobs import Job, Jobs, JobState
from workbench.ports import free_port
from workbench.runs.schedules import Schedules
from workbench.runs.steps import NOT_NEEDED, gate_record
from workbench.store import open_store

ROOT = Path(__file__).resolve().parents[2]
# Quality alone: whether a difference in speed can be proven depends on what else this machine does.
RULES = """
[[rules]]
kind = "better"
metric = "exact_match"

[[rules]]
kind = "slices_not_worse"
metric = "exact_match"
tag = "slice"
max_loss = 0.1
"""


@pytest.fixture
def up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """`quire up` in a HOME_DIR of its own, which is yielded; this process's settings are the same."""
    home = tmp_path / "home"
    for name in [name for name in os.environ if name.startswith(("QUIRE_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    own = {
        "HOME_DIR": str(home),
        "PORT": str(free_port()),
        "MLFLOW_PORT": str(free_port()),
        "PYTHONPATH": str(ROOT),
    }
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    log = (tmp_path / "up.log").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-m", "workbench.cli", "up"], env=os.environ.copy(), stdout=log, stderr=log,
        stdin=subprocess.DEVNULL, cwd=tmp_path,
    )  # fmt: skip
    log.close()
    try:
        yield home
    finally:
        process.terminate()
        process.wait(30)


def wait_for(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.5)


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_it_promotes_the_better_version_once_on_a_one_minute_schedule(up: Path) -> None:
    with open_store(up) as store:
        jobs, schedules = Jobs(store, up), Schedules(store, up)

        def ended(kind: str) -> list[Job]:
            return [job for job in jobs.list(kind=kind, limit=200) if job.ended]

        wait_for(lambda: bool(ended("seed_demo")), 300)
        assert ended("seed_demo")[0].state is JobState.DONE
        rules = up.parent / "rules.toml"
        rules.write_text(RULES)
        values = {"candidate": "2", "promote": True, "rules": str(rules)}
        schedules.add("nightly", "nightly_gate", values, every_s=60)
        wait_for(lambda: len(ended("notebook")) >= 2, 800)
        schedules.enable("nightly", False)
        second, first = ended("notebook")[-2:]
        fired = [each for each in schedules.history(limit=100) if each.outcome == "fired"]
        assert {job.id for job in (first, second)} <= {each.job_id for each in fired}
        assert first.state is second.state is JobState.DONE, (first.error, second.error)
        assert first.result is not None
        assert second.result is not None
        verdict = first.result["record"]["values"]
        assert (verdict["verdict"], verdict["champion"], verdict["candidate"]) == ("promote", 1, 2), verdict[
            "reasons"
        ]
        assert verdict["promoted"] is True
        assert verdict["exact_match_low"] > 0
        assert second.result["record"]["values"]["verdict"] == NOT_NEEDED
        (gate,) = ended("gate")
        assert gate.parent_id == first.id, "the notebook's own job, in the running app"
        assert gate.result is not None
        assert gate_record({**gate.result}) == verdict, "the notebook's figures are those of the job"
    champion = (
        "import sys; from workbench import settings; from workbench.versions.registry import Registry;"
        "print(Registry(settings.load()).get('ticket-extractor', '@champion').ref.version)"
    )
    told = subprocess.run(
        [sys.executable, "-c", champion], capture_output=True, text=True, check=True, timeout=120
    )
    assert told.stdout.strip().splitlines()[-1] == "2"


def test_a_gate_s_record_is_flat_and_json() -> None:
    result = {
        "name": "m", "champion": 1, "candidate": 2, "verdict": "promote", "promoted": False, "run_id": "r", "note": "",
        "reasons": [{"rule": "better", "outcome": "promote", "text": "is better"}],
        "metrics": {"exact_match": {"a": 0.5, "b": 0.6, "diff": 0.1, "low": 0.05, "high": 0.15, "n": 40, "wins": 9}},
    }  # fmt: skip
    flat = gate_record(result)
    assert flat["reasons"] == ["is better"]
    assert (flat["exact_match_diff"], flat["exact_match_n"]) == (0.1, 40)
    assert json.loads(json.dumps(flat)) == flat
