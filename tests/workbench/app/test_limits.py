"""Limits kept under HOME_DIR: found under their own conditions only, measured while nothing runs, measured once."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "pages"))  # page_world

from page_world import make_worker

from engine.fake_runner import FakeRunner
from engine.plan import StepResult
from engine.sampling_params import SamplingParams
from workbench.errors import HomeDirError, NotReadyError
from workbench.limits import FILE, LimitKeeper, LimitStore, MachineBusyError, MeasuredLimits

GREEDY = SamplingParams(max_tokens=4, ignore_eos=True)


class NeedyRunner(FakeRunner):
    """Its steps need something, as a model's do."""

    def collect(self) -> StepResult:
        return replace(super().collect(), bytes_needed=1000, weight_bytes=900, flops_needed=1000)


@pytest.fixture
def worker():
    made, _ = make_worker()
    made.start()
    yield made
    made.close()


def kept(store: LimitStore, worker) -> MeasuredLimits:
    """Limits as if they had been measured, written where a store finds them."""
    made = MeasuredLimits(
        conditions=store.conditions(worker), bytes_s=1e10, flops_s=1e11, at="2026-11-21T03:00:00+00:00"
    )
    store._write([made])
    return made


def test_measured_once_and_found_by_every_later_process(worker, tmp_path):
    store = LimitStore(tmp_path)
    assert store.find(worker) is None
    found = store.measure(worker)
    assert found.bytes_s > 1e8
    assert found.flops_s > 1e8
    assert found.conditions.working_set_bytes == 2**24  # the ledger says 14 MiB of weights
    assert LimitStore(tmp_path).find(worker) == store.find(worker) == found
    assert found.limits.bytes_s == found.bytes_s


def test_other_conditions_find_nothing(worker, tmp_path):
    store = LimitStore(tmp_path)
    measured = kept(store, worker)
    assert store.find(worker) == measured
    for change in ({"dtype": "bfloat16"}, {"threads": 64}, {"machine": "another"}, {"working_set_bytes": 1}):
        other = measured.model_copy(update={"conditions": measured.conditions.model_copy(update=change)})
        store._write([other])
        assert store.find(worker) is None, change


def test_a_broken_file_counts_as_not_measured(worker, tmp_path, fault):
    (tmp_path / FILE).write_text("{")
    assert LimitStore(tmp_path).find(worker) is None
    measured = kept(LimitStore(tmp_path), worker)
    assert LimitStore(tmp_path).find(worker) == measured
    fault(
        "limits.json is half-written", fails="nothing", goes_on="all; the machine counts as not measured",
        afterwards="the next measurement replaces the file",
    )  # fmt: skip


def test_what_cannot_be_kept_says_so_and_leaves_nothing(worker, tmp_path):
    store = LimitStore(tmp_path / "gone")
    with pytest.raises(HomeDirError, match="No such file"):
        kept(store, worker)
    assert list(tmp_path.iterdir()) == []


def test_it_is_not_measured_while_requests_run(tmp_path):
    worker, _ = make_worker(delay_s=0.02)
    worker.start()
    stream = worker.submit([1, 2, 3], SamplingParams(max_tokens=400, ignore_eos=True))
    with pytest.raises(MachineBusyError):
        LimitStore(tmp_path).measure(worker)
    stream.abort()
    worker.close()
    assert not (tmp_path / FILE).exists()


def test_keeper_measures_an_engine_that_has_worked_and_is_idle(tmp_path):
    worker, _ = make_worker(runner_type=NeedyRunner)
    worker.start()
    store = LimitStore(tmp_path)
    asked = []

    def find():
        asked.append(True)
        if len(asked) == 1:
            raise NotReadyError("loading")
        return worker

    keeper = LimitKeeper(find, store, idle_s=0.05)
    keeper.start()
    wait_until(lambda: len(asked) > 3)
    assert store.find(worker) is None  # nothing was computed yet
    worker.submit([1, 2, 3], GREEDY).result(10)
    wait_until(lambda: store.find(worker) is not None)
    wait_until(lambda: not keeper._thread.is_alive())  # once is enough
    keeper.close()
    worker.close()


def test_keeper_leaves_engines_without_a_model_alone(worker, tmp_path):
    worker.submit([1, 2, 3], GREEDY).result(10)
    store, asked = LimitStore(tmp_path), []

    def find():
        asked.append(True)
        return worker

    keeper = LimitKeeper(find, store, idle_s=0.02)
    keeper.start()
    wait_until(lambda: len(asked) > 5)
    keeper.close()
    assert store.find(worker) is None


def wait_until(condition, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
