"""Ports that are taken, and the file that says where the app is."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from workbench.errors import PortInUseError
from workbench.ports import bind, check_free, owner_pid
from workbench.run_state import RunState


def test_a_taken_port_is_refused_with_owner_and_way_out() -> None:
    with bind("127.0.0.1", 0) as held:
        port = held.getsockname()[1]
        assert owner_pid(port) == os.getpid()
        with pytest.raises(PortInUseError) as caught:
            check_free("127.0.0.1", port, variable="MLFLOW_PORT")
    assert (caught.value.value, caught.value.param) == (port, "MLFLOW_PORT")
    assert f"process {os.getpid()}" in str(caught.value)
    assert "MLFLOW_PORT=" in str(caught.value)
    check_free("127.0.0.1", port, variable="MLFLOW_PORT")


def test_small_packets_are_sent_at_once() -> None:
    """asyncio switches Nagle's algorithm off only for sockets that name their protocol."""
    with bind("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP


def test_the_run_file_tells_of_a_living_process_only(tmp_path: Path) -> None:
    state = RunState(tmp_path)
    assert state.read() is None
    state.write("http://127.0.0.1:1", model="m")
    app = state.read()
    assert app is not None
    assert (app.url, app.pid, app.model) == ("http://127.0.0.1:1", os.getpid(), "m")
    assert [entry.name for entry in tmp_path.iterdir()] == ["app.json"]
    file = tmp_path / "app.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pid": 2**22 + 1}))
    assert state.read() is None
    state.remove()
    assert file.exists(), "another process's file is left alone"
    file.write_text("{half")
    assert state.read() is None
