"""Slow services off the script thread: what a page gets while they answer, fail, and answer again."""

from __future__ import annotations

import os
import sys
import threading
import time

import pytest

from workbench.ui.actions import Actions
from workbench.ui.readings import Readings


def eventually(condition, timeout_s: float = 5.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return False


class Service:
    """Answers when it is allowed to, with a number that counts its calls."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.calls = 0
        self.error: Exception | None = None

    def __call__(self) -> int:
        self.calls += 1
        number = self.calls
        assert self.open.wait(10)
        if self.error is not None:
            raise self.error
        return number


def test_first_value_is_awaited_and_then_served_from_memory():
    readings, service = Readings(), Service()
    first = readings.get(("a",), service, ttl_s=60)
    again = readings.get(("a",), service, ttl_s=60)
    assert (first.value, again.value, service.calls) == (1, 1, 1)
    assert again.age_s is not None
    assert not again.pending


def test_the_value_may_say_how_long_it_lasts():
    readings, service = Readings(), Service()
    service.error = OSError("starting")

    def lasts(number: int) -> float:
        return 60.0 if number >= 3 else 0.0

    assert readings.get(("a",), service, ttl_s=lasts).value is None  # no value that could say it
    service.error = None
    readings.forget("a")
    assert readings.get(("a",), service, ttl_s=lasts).value == 2
    readings.get(("a",), service, ttl_s=lasts)  # old at once: read again
    assert eventually(lambda: readings.get(("a",), service, ttl_s=lasts).value == 3)
    calls = service.calls
    readings.get(("a",), service, ttl_s=lasts)
    assert service.calls == calls


def test_slow_service_does_not_hold_the_page():
    readings, service = Readings(), Service()
    service.open.clear()
    began = time.monotonic()
    reading = readings.get(("a",), service, wait_s=0.1)
    assert time.monotonic() - began < 2
    assert reading.value is None
    assert reading.pending
    service.open.set()
    assert eventually(lambda: readings.get(("a",), service).value == 1)
    assert service.calls == 1


def test_old_value_is_served_at_once_while_a_new_one_is_read():
    readings, service = Readings(), Service()
    assert readings.get(("a",), service, ttl_s=0).value == 1
    service.open.clear()
    began = time.monotonic()
    old = readings.get(("a",), service, ttl_s=0, wait_s=5)
    assert time.monotonic() - began < 1
    assert (old.value, old.pending) == (1, True)
    service.open.set()
    assert eventually(lambda: readings.get(("a",), service, ttl_s=60).value == 2)


def test_forgotten_value_is_awaited_anew_and_others_are_not():
    readings, service, other = Readings(), Service(), Service()
    readings.get(("registry", "names"), service, ttl_s=60)
    readings.get(("datasets",), other, ttl_s=60)
    readings.forget("registry")
    assert readings.get(("registry", "names"), service, ttl_s=60, wait_s=5).value == 2
    assert readings.get(("datasets",), other, ttl_s=60).value == 1


def test_failure_is_told_beside_the_last_good_value():
    readings, service = Readings(), Service()
    readings.get(("a",), service, ttl_s=60)
    service.error = ValueError("the store is gone")
    readings.forget("a")
    reading = readings.get(("a",), service, ttl_s=60, wait_s=5)
    assert reading.value == 1
    assert str(reading.error) == "the store is gone"
    service.error = None
    readings.forget("a")
    assert readings.get(("a",), service, ttl_s=60, wait_s=5).error is None


def test_oldest_readings_go_first():
    readings = Readings(limit=2)
    services = [Service() for _ in range(3)]
    for place, service in enumerate(services):
        readings.get((place,), service, ttl_s=60)
    readings.get((2,), services[2], ttl_s=60)
    readings.get((0,), services[0], ttl_s=60)
    assert [service.calls for service in services] == [2, 1, 1]


def test_second_click_while_it_runs_is_the_same_action():
    actions, service = Actions(), Service()
    service.open.clear()
    first = actions.start("load:x", "Load x", service, wait_s=0)
    assert actions.start("load:x", "Load x", service, wait_s=0) is first
    assert [a.key for a in actions.running()] == ["load:x"]
    service.open.set()
    assert first.wait(5)
    assert (first.result, service.calls) == (1, 1)
    assert actions.start("load:x", "Load x", service, wait_s=5).result == 2


def test_failed_action_is_told_until_it_is_dismissed():
    actions, service = Actions(), Service()
    service.error = ValueError("no such model")
    actions.start("load:x", "Load x", service, wait_s=5)
    actions.start("other", "Other", lambda: None, wait_s=5)
    (shown,) = actions.lately("load:", seconds=0)
    assert str(shown.error) == "no such model"
    actions.dismiss("load:x")
    assert actions.lately("load:", seconds=60) == []


@pytest.mark.parametrize("fails", [False, True])
def test_what_follows_an_action_runs_however_it_ended(fails):
    actions, told = Actions(), []
    service = Service()
    service.error = ValueError("no") if fails else None
    action = actions.start("a", "A", service, after=lambda: told.append(True), wait_s=5)
    assert not action.running
    assert told == [True]


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a priority of their own on Linux alone")
def test_action_has_the_priority_of_the_app_and_not_of_the_page():
    actions, found = Actions(), []

    def page() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + 5)
        priority = lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id())  # noqa: E731
        found.extend([priority(), actions.start("a", "A", priority, wait_s=5).result])

    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    thread = threading.Thread(target=page)
    thread.start()
    thread.join(10)
    assert found == [before + 5, before]
    actions.close()
