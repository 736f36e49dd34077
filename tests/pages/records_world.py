"""Real records for page tests: a store, a registry with versions, jobs and benchmarks as their processes leave them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from page_world import html_of, make_worker
from streamlit.testing.v1 import AppTest

from engine.config import EngineConfig
from engine.worker import EngineWorker
from workbench import settings as settings_module
from workbench.host import FAKE_MODEL, EngineHost
from workbench.jobs import Job, Jobs, JobState
from workbench.jobs.claims import Claims
from workbench.jobs.process_id import ProcessId
from workbench.settings import Settings
from workbench.store import jobs as jobs_table
from workbench.store import open_store
from workbench.ui import resources

NAME = "ticket-extractor"
CLOSED_PORT = 9  # nothing listens there: MLflow's SQLite file is used directly


def make_model(folder: Path, seed: int) -> Path:
    """A folder that has the form of a model and a digest of its own."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    save_file({"weight": np.full((2, 2), seed, np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "seed": seed}))
    return folder


def settings_of(home: Path) -> Settings:
    made = settings_module.load(home_dir=home, mlflow_port=CLOSED_PORT)
    settings_module.prepare_home(made)
    return made


def fill_registry(settings: Settings, num_versions: int = 3) -> None:
    """`NAME` with versions 1 … n, the champion being 1."""
    from workbench.versions.registry import Registry

    registry = Registry(settings)
    for number in range(1, num_versions + 1):
        folder = make_model(settings.home_dir / "models" / f"m{number}", number)
        registry.register(
            NAME,
            base=folder,
            description=f"version number {number}",
            metrics={"exact_match": 0.5 + number / 10},
        )
    registry.promote(NAME, 1, reason="the first one")


def copy_home(template: Path, target: Path) -> Settings:
    """A HOME_DIR of its own with what the template's registry holds."""
    shutil.copytree(template, target)
    return settings_of(target)


class Records:
    """What one page test works on."""

    def __init__(self, settings: Settings, **runner_options: Any) -> None:
        from workbench.versions import resolve

        self.settings = settings
        self.store = open_store(settings.home_dir)
        self.jobs = Jobs(self.store, settings.home_dir)

        def factory(config: EngineConfig, *, progress: Any, on_fatal: Any) -> EngineWorker:
            return make_worker(on_fatal=on_fatal, **runner_options)[0]

        self.host = EngineHost(
            EngineConfig(model=FAKE_MODEL), factory=factory, resolver=lambda ref: resolve(ref, settings)
        )
        self.host.start()
        assert self.host.wait(10).ready, self.host.state()
        resources.provide(self.host, settings=settings, jobs=self.jobs, store=self.store)

    def close(self) -> None:
        resources.provide(None)
        self.host.close()
        self.store.close()

    def job(self, kind: str, spec: dict[str, Any], state: JobState, title: str = "", **facts: Any) -> Job:
        """A job in some state, written through the same rows that its process writes."""
        values = {
            "id": f"{kind}-{len(self.jobs.list(limit=500))}", "kind": kind, "title": title or kind, "spec": spec,
            "state": JobState.QUEUED.value, "device": "shared", "created_at": _now(),
            "log_path": str(self.settings.home_dir / "jobs" / f"{kind}.log"),
        }  # fmt: skip
        with self.store.begin() as connection:
            connection.execute(jobs_table.insert().values(values))
        owner, claims = ProcessId.of(os.getpid()), Claims(self.store)
        if state is not JobState.QUEUED:
            assert claims.claim(values["id"], owner)
            claims.progress(values["id"], owner, facts.pop("fraction", 0.5), facts.pop("message", "Working"))
            if "partial" in facts:
                claims.store_partial(values["id"], owner, facts.pop("partial"))
        if state not in (JobState.QUEUED, JobState.RUNNING):
            assert claims.finish(values["id"], owner, state, **facts)
        return self.jobs.get(values["id"])


def settle(at: AppTest) -> AppTest:
    """Rerun until nothing is read and no action runs any more."""
    assert eventually(lambda: not resources.actions().running())
    assert eventually(lambda: "Reading " not in html_of(at.run()))
    assert not at.exception
    return at


def _now() -> str:
    from workbench.store import utc_now

    return utc_now()


def eventually(condition: Callable[[], bool], timeout_s: float = 60.0) -> bool:
    import time

    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False
