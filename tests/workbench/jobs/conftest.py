"""A store of one's own, and a runner that is ended with the test."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from workbench import settings as settings_module
from workbench.jobs import JobRunner, Jobs

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("QUIRE_", "MLFLOW_"))]:
        monkeypatch.delenv(name)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def start_runner(jobs: Jobs, home: Path) -> Iterator[Callable[..., JobRunner]]:
    """Starts a JobRunner; it is closed with the test."""
    started: list[JobRunner] = []

    def start(max_parallel: int = 3) -> JobRunner:
        started.append(JobRunner(jobs, settings_module.load(home_dir=home), max_parallel=max_parallel))
        started[-1].start()
        return started[-1]

    yield start
    for runner in started:
        runner.close()
