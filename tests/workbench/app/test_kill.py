"""Thirty kills at random moments under work: nothing that was acknowledged is lost, doubled or half-written."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from workbench import settings as settings_module
from workbench.errors import WorkbenchError
from workbench.jobs import Jobs, JobState
from workbench.observe import feedback, request_reader
from workbench.runs.schedules import Schedules
from workbench.store import open_store
from workbench.versions.registry import Registry

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]

KILLS = 30
MOST_OF_A_KIND = 12
MIN_ANSWERS = 50
SEED = int(os.environ.get("QUIRE_PROOF_SEED", "20261120"))
NAME = "killed"
NOTEBOOK = {
    "cells": [
        {"cell_type": "markdown", "id": "a", "metadata": {}, "source": "# Tick"},
        {"cell_type": "code", "id": "b", "metadata": {"tags": ["parameters"]}, "execution_count": None, "outputs": [],
         "source": "number: int = 1  # any"},
        {"cell_type": "code", "id": "c", "metadata": {}, "execution_count": None, "outputs": [], "source": "number + 1"},
    ],
    "metadata": {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}},
    "nbformat": 4, "nbformat_minor": 5,
}  # fmt: skip


class Work:
    """What users do meanwhile, and what they were told is done."""

    def __init__(self, url: str, home: Path, registry: Registry) -> None:
        self.url, self.registry, self.home = url, registry, home
        self.store = open_store(home)
        self.jobs = Jobs(self.store, home)
        self.answered: list[str] = []
        self.voted: list[str] = []
        self.submitted: list[str] = []
        self.schedules: list[str] = []
        self.registered: list[int | None] = []
        self.aliases: list[int] = []  # every version that an alias move was begun to
        self.acknowledged_alias = 0
        self.failures: list[BaseException] = []
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._repeat, args=(each, pause), daemon=True)
            for each, pause in (
                (self._ask, 0.02),
                (self._vote, 0.1),
                (self._submit, 0.5),
                (self._promote, 2.0),
                (self._schedule, 1.0),
                (self._register, 5.0),
            )
        ]

    def __enter__(self) -> Work:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
        self.store.close()

    def _repeat(self, act: Callable[[], None], pause_s: float) -> None:
        while not self._stop.wait(pause_s):
            try:
                act()
            except (httpx.HTTPError, WorkbenchError):
                self._stop.wait(0.2)  # the killed process is being started again
            except BaseException as error:
                self.failures.append(error)
                raise

    def _ask(self) -> None:
        body = {"model": "fake-echo", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}
        answer = httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=30)
        if answer.status_code == 200:
            self.answered.append(answer.json()["id"].removeprefix("chatcmpl-"))

    def _vote(self) -> None:
        request_id = f"vote-{len(self.voted)}-{random.random()}"
        vote = {"request_id": request_id, "kind": "thumbs", "value": "up"}
        if httpx.post(f"{self.url}/v1/feedback", json=vote, timeout=30).status_code == 200:
            self.voted.append(request_id)

    def _submit(self) -> None:
        if (
            len(self.jobs.list(states=[JobState.QUEUED, JobState.RUNNING])) < 3
        ):  # more would take the processor from the app
            self.submitted.append(self.jobs.submit("probe", {"steps": 15, "step_s": 0.1}).id)

    def _schedule(self) -> None:
        name = f"schedule-{len(self.schedules)}-{random.random()}"
        self.schedules.append(Schedules(self.store, self.home).add(name, "tick", at="2099-01-01T00:00").name)

    def _register(self) -> None:
        number = 3 + len(self.registered)
        folder = another_version(self.home.parent / "model-1", number)
        self.registered.append(self.registry.register(NAME, base=folder).version)

    def _promote(self) -> None:
        version = len(self.aliases) % 2 + 1
        self.aliases.append(version)
        self.registry.promote(NAME, version)
        self.acknowledged_alias = version


def victims(running: Any, jobs: Jobs) -> dict[str, list[int]]:
    """Processes by what they are."""
    found: dict[str, list[int]] = {"app": [], "scheduler": []}
    for pid in running.descendants():
        with suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
            if "workbench.app" in command:
                found["app"].append(pid)
            elif "workbench.runs.scheduler" in command:
                found["scheduler"].append(pid)
    found["job"] = [
        job.pid for job in jobs.list(states=[JobState.RUNNING]) if job.pid and job.pid != os.getpid()
    ]
    return found


@pytest.fixture
def registry(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """Two versions of a tiny model in the MLflow store that the app uses too."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("HOME_DIR", str(tmp_path / "home"))
    registry = Registry(settings_module.load())
    shutil.copytree(tiny_model, tmp_path / "model-0")
    for number in (1, 2):
        assert registry.register(NAME, base=another_version(tmp_path / "model-0", number)).version == number
    return registry


def another_version(model: Path, number: int) -> Path:
    """The model in another folder beside its own, with a config that makes it another one."""
    folder = model.parent / f"model-{number}"
    shutil.copytree(model, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 10000.0 + number}))
    return folder


def test_thirty_kills_lose_nothing(
    quire: Callable[..., Any], registry: Registry, proc: Any, tmp_path: Path, fault: Any
) -> None:
    rng = random.Random(SEED)
    home = tmp_path / "home"
    (home / "notebooks").mkdir(parents=True)
    (home / "notebooks" / "tick.ipynb").write_text(json.dumps(NOTEBOOK))
    running = quire("up", QUIRE_FOLLOW="", MLFLOW_TRACKING_URI=os.environ["MLFLOW_TRACKING_URI"])
    running.wait_line("is ready")
    with open_store(home) as store:
        Schedules(store, home).add("tick", "tick", every_s=10.0)
    killed: Counter[str] = Counter()
    with Work(running.url, home, registry) as work:
        served = 0
        while sum(killed.values()) < KILLS or len(work.answered) <= MIN_ANSWERS:
            time.sleep(rng.uniform(0.2, 2.0))
            choices = {kind: pids for kind, pids in victims(running, work.jobs).items() if pids}
            # Mostly while it serves, sometimes while it starts: an app that never comes up proves nothing.
            if len(work.answered) < served + (0 if rng.random() < 0.02 else rng.choice((3, 10, 30))):
                choices.pop("app", None)
            choices = {kind: pids for kind, pids in choices.items() if killed[kind] < MOST_OF_A_KIND}
            if sum(killed.values()) >= KILLS:
                continue  # enough kills; what is missing is work that could have been lost
            if not choices:
                continue
            kind = min(choices, key=lambda each: (killed[each], rng.random()))  # each kind its share
            with suppress(ProcessLookupError):
                os.kill(rng.choice(choices[kind]), signal.SIGKILL)
                killed[kind] += 1
                served = len(work.answered) if kind == "app" else served
        assert proc.eventually(lambda: httpx.get(f"{running.url}/readyz", timeout=60).status_code == 200, 120)
        marks = len(work.answered), len(work.submitted)
        assert proc.eventually(lambda: len(work.answered) > marks[0] and len(work.submitted) > marks[1], 60)
    assert not work.failures, work.failures
    print(f"killed {dict(killed)}; {len(work.answered)} answers, {len(work.voted)} votes, {len(work.submitted)} jobs, "
          f"{len(work.aliases)} alias moves, {len(work.schedules)} schedules, {len(work.registered)} versions")  # fmt: skip
    assert min(killed["app"], killed["scheduler"], killed["job"]) > 3, killed
    assert len(work.answered) > MIN_ANSWERS
    assert len(work.voted) > 20
    assert min(len(work.schedules), len(work.registered)) > 3
    with open_store(home) as store:
        jobs = Jobs(store, home)
        assert proc.eventually(lambda: all(jobs.get(each).ended for each in work.submitted), 120)
        assert running.stop() < 15
        states = Counter(jobs.get(each).state for each in work.submitted)
        assert states[JobState.DONE] > 0
        assert states[JobState.INTERRUPTED] > 0, "no job was killed: the proof proves nothing about jobs"
        assert set(states) <= {JobState.DONE, JobState.INTERRUPTED}, states
        votes = Counter(each.request_id for each in feedback.list_feedback(store, limit=100_000))
        assert not [each for each in work.voted if votes[each] != 1]
        assert {each.name for each in Schedules(store, home).list()} >= {"tick", *work.schedules}
        history = Schedules(store, home).history(limit=10_000)
        assert len({each.due_at for each in history}) == len(history) > 3
        assert all(each.job_id for each in history if each.outcome == "fired")
    logged = Counter(request_reader.read(home).column("request_id").to_pylist())
    assert not [each for each in work.answered if logged[each] != 1]
    champion = registry.get(NAME, "@champion").ref.version
    assert champion in {work.acknowledged_alias, work.aliases[-1]}
    assert {1, 2, *work.registered} <= {each.ref.version for each in registry.versions(NAME)}
    fault(
        "thirty SIGKILLs of app, scheduler and jobs at random moments under load",
        fails="the connections of a killed app; a killed job, which is interrupted", goes_on="all else, within seconds",
        afterwards="every answered request on the log once, every vote once, every job, schedule and version that was named, the alias "
        "where it was moved to; no due time fired twice",
    )  # fmt: skip
