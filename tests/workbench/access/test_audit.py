"""The audit log: each act with who, what and outcome, in the transaction of the act where there is one."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig
from workbench.access import audit
from workbench.access.acting import acting, acting_as
from workbench.access.audit import Audit
from workbench.access.principal import OWNER, Principal, Right
from workbench.errors import UnknownModelError
from workbench.host import FAKE_MODEL, EngineHost, fake_worker
from workbench.jobs import Jobs
from workbench.runs.schedules import Schedules
from workbench.store import Store
from workbench.ui.actions import Actions

ANN = Principal("ann", frozenset({Right.ADMIN}))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def acts(store: Store) -> list[tuple[str, str, str, str]]:
    """Oldest first."""
    return [(each.principal, each.act, each.target, each.outcome) for each in audit.latest(store)[::-1]]


def test_what_is_done_to_engines_is_written_with_its_outcome(store: Store, tiny_model: Path) -> None:
    told = Audit()
    told.store = store
    with EngineHost(
        EngineConfig(model=FAKE_MODEL), factory=partial(fake_worker, delay_s=0.0), audit=told
    ) as host:
        host.start()
        host.wait(10)
        with acting_as(ANN):
            host.load(str(tiny_model))
            with pytest.raises(UnknownModelError):
                host.unload("nobody")
        host.unload(tiny_model.name)
    assert acts(store) == [
        ("ann", "load model", str(tiny_model), "ok"), ("ann", "unload model", "nobody", "model_not_found"),
        ("local", "unload model", tiny_model.name, "ok"),
    ]  # fmt: skip


def test_an_act_stands_where_the_log_cannot_be_written(store: Store, caplog: Any) -> None:
    told = Audit()
    told.store = store
    with store.begin() as connection:
        connection.exec_driver_sql("DROP TABLE audit_log")
    with told.of("load model", "m"):
        pass
    assert "not on the audit log: load model m by local: ok" in caplog.text


def test_jobs_and_schedules_are_written_with_their_rows(store: Store, jobs: Jobs, home: Path) -> None:
    schedules = Schedules(store, home)
    with acting_as(ANN):
        job = jobs.submit("probe", {}, title="try")
        jobs.cancel(job.id)
        jobs.cancel(job.id)  # it has ended: no act
        schedules.add("nightly", "benchmark", cron="0 3 * * *")
        schedules.enable("nightly", False)
        schedules.remove("nightly")
    assert acts(store) == [
        ("ann", "start job", job.id, "ok"), ("ann", "cancel job", job.id, "ok"), ("ann", "add schedule", "nightly", "ok"),
        ("ann", "pause schedule", "nightly", "ok"), ("ann", "remove schedule", "nightly", "ok"),
    ]  # fmt: skip


def test_who_acts_is_known_in_actions_of_pages_and_nowhere_else(store: Store) -> None:
    actions, heard = Actions(), list[Principal]()
    with acting_as(ANN):
        assert actions.start("k", "look", acting, wait_s=10).result == ANN
        heard.append(acting())
        other = threading.Thread(target=lambda: heard.append(acting()))
        other.start()
        other.join()
    actions.close()
    assert heard == [ANN, OWNER]
    assert acting() == OWNER
