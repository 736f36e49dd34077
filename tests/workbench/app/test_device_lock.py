"""The device's lock: one owner, named to whoever comes second, and free again when its process ends in any way."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from workbench.device_lock import DeviceBusyError, DeviceLock
from workbench.run_state import RunState

HOLDER = """
import sys, time
from pathlib import Path
from workbench.device_lock import DeviceLock
lock = DeviceLock(Path(sys.argv[1])).acquire("http://127.0.0.1:8599")
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_owner_is_refused_with_process_and_address_of_the_first(tmp_path: Path) -> None:
    with DeviceLock(tmp_path).acquire("http://127.0.0.1:8501") as first:
        second = DeviceLock(tmp_path)
        with pytest.raises(DeviceBusyError) as caught:
            second.acquire()
        error = caught.value
        assert (error.pid, error.address, error.param) == (os.getpid(), "http://127.0.0.1:8501", "HOME_DIR")
        assert f"process {os.getpid()} at http://127.0.0.1:8501" in str(error)
        assert error.remedy
        assert not second.held
        with pytest.raises(DeviceBusyError):
            first.acquire()  # not re-entrant: a second model would be loaded
        again = pickle.loads(pickle.dumps(error))
        assert (str(again), again.pid, again.address) == (str(error), error.pid, error.address)
    with second.acquire():
        assert second.held


def test_devices_and_homes_are_apart(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with (
        DeviceLock(tmp_path, "0").acquire(),
        DeviceLock(tmp_path, "1").acquire(),
        DeviceLock(other).acquire(),
    ):
        assert (tmp_path / "device-1.lock").is_file()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"url": "x", "pid": 1e400}',
        f'{{"url": "x", "pid": {10**30}, "started_at": "", "model": ""}}',
    ],
)
def test_a_run_file_that_is_none_counts_as_no_app(tmp_path: Path, content: str, fault: Any) -> None:
    (tmp_path / "app.json").write_text(content)
    state = RunState(tmp_path)
    assert state.read() is None
    state.remove()
    state.write("http://127.0.0.1:8501", model="m")
    found = state.read()
    assert found is not None
    assert found.pid == os.getpid()
    fault(
        "run/app.json holds garbage", fails="notebooks and commands find no app; they load no second model either: the device's lock names "
        "its owner", goes_on="the app", afterwards="the next start writes it anew",
    )  # fmt: skip


def test_the_lock_of_a_killed_process_is_free_and_its_name_forgotten(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    with holder.stdout:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(DeviceBusyError, match=rf"process {holder.pid} at http://127\.0\.0\.1:8599"):
            DeviceLock(tmp_path).acquire()
        holder.send_signal(signal.SIGKILL)
        holder.wait(10)
    with DeviceLock(tmp_path).acquire(), pytest.raises(DeviceBusyError) as caught:
        DeviceLock(tmp_path).acquire()
    assert (caught.value.pid, caught.value.address) == (os.getpid(), "")


def test_an_owner_that_has_not_written_its_name_is_found_in_the_run_state(tmp_path: Path) -> None:
    RunState(tmp_path).write("http://127.0.0.1:8502", model="x", token="t")
    with DeviceLock(tmp_path).acquire() as lock:
        lock.file.write_text("")  # the moment between locking and writing
        with pytest.raises(DeviceBusyError) as caught:
            DeviceLock(tmp_path).acquire()
    assert (caught.value.pid, caught.value.address) == (os.getpid(), "http://127.0.0.1:8502")


def test_the_run_state_keeps_its_token_from_others(tmp_path: Path) -> None:
    state = RunState(tmp_path)
    state.write("http://127.0.0.1:8501", model="m", token="secret")
    file = tmp_path / "app.json"
    assert file.stat().st_mode & 0o777 == 0o600
    running = state.read()
    assert running is not None
    assert running.token == "secret"
    file.chmod(0o644)  # a file of an earlier process, whatever its mode
    state.write("http://127.0.0.1:8501", model="m", token="other")
    assert file.stat().st_mode & 0o777 == 0o600
