"""`quire notebook`, `quire schedule` and `quire lab` as people and programs call them."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from workbench import cli
from workbench.commands.lab import lab_token, notebook_folder
from workbench.ports import free_port
from workbench.settings import Settings


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    """Exit code and the JSON object on the last line."""
    code = cli.main([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_notebook_list_tells_parameters(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, told = run(capsys, "notebook", "list")
    probe = next(each for each in told["notebooks"] if each["name"] == "probe")
    assert code == 0
    assert probe["parameters"][0] == {"name": "n", "type": "int", "default": 3, "comment": "numbers to add"}
    assert {"probe", "nightly_gate"} <= {each["name"] for each in told["notebooks"]}


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("notebook", "run", "nothing"), "notebook_not_found"),
        (("notebook", "run", "probe", "-p", "m=1"), "notebook_parameter"),
        (("notebook", "run", "probe", "-p", "n=x"), "notebook_parameter"),
        (("schedule", "add", "a", "--notebook", "probe", "--at", "2020-01-01T00:00"), "schedule_in_the_past"),
        (("schedule", "add", "a", "--notebook", "probe", "--every", "soon"), "invalid_schedule"),
        (("schedule", "add", "a", "--notebook", "probe", "--cron", "x"), "invalid_schedule"),
        (("schedule", "add", "a", "--notebook", "probe", "--every", "5m", "-p", "m=1"), "notebook_parameter"),
        (("schedule", "remove", "nothing"), "schedule_not_found"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    home: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], code: str
) -> None:
    status, told = run(capsys, *arguments)
    assert (status, told["error"]["code"]) == (2, code)


def test_a_schedule_from_add_to_history(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    added = ("schedule", "add", "nightly", "--notebook", "probe", "-p", "n=7")
    code, told = run(capsys, *added, "--cron", "0 3 * * *", "--timezone", "Europe/Berlin", "--grace", "2h")
    assert code == 0
    assert told["schedule"]["parameters"] == {"n": 7}
    assert (told["schedule"]["grace_s"], told["schedule"]["when"]) == (7200, "cron 0 3 * * * (Europe/Berlin)")
    assert [each["name"] for each in run(capsys, "schedule", "list")[1]["schedules"]] == ["nightly"]
    assert run(capsys, "schedule", "pause", "nightly")[1]["schedule"]["enabled"] is False
    assert run(capsys, "schedule", "resume", "nightly")[1]["schedule"]["enabled"] is True
    assert run(capsys, "schedule", "history", "nightly") == (0, {"history": []})
    assert run(capsys, "schedule", "remove", "nightly")[0] == 0
    assert run(capsys, "schedule", "list")[1] == {"schedules": []}


def test_the_lab_s_token_is_kept_and_its_owner_s_alone(settings: Settings) -> None:
    token = lab_token(settings)
    assert len(token) == 48
    assert lab_token(settings) == token
    assert stat.S_IMODE((settings.run_dir / "lab-token").stat().st_mode) == 0o600
    (settings.run_dir / "lab-token").write_text("")  # its writer was killed
    assert len(lab_token(settings)) == 48
    assert (notebook_folder(settings) / "nightly_gate.ipynb").is_file()


@pytest.mark.full
def test_the_lab_listens_on_loopback_and_asks_for_its_token(settings: Settings, tmp_path: Path) -> None:
    port = free_port()
    out = (tmp_path / "out").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-m", "workbench.cli", "lab", "--port", str(port), "--json"], env=os.environ.copy(), stdout=out,
        stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    out.close()
    try:
        deadline = time.monotonic() + 90
        while not (text := (tmp_path / "out").read_text()) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.1)
        told = json.loads(text.splitlines()[-1])
        base = f"http://127.0.0.1:{port}"
        assert told["url"] == f"{base}/lab?token={lab_token(settings)}"
        assert httpx.get(f"{base}/api/contents", timeout=30).status_code == 403
        headers = {"authorization": f"token {lab_token(settings)}"}
        found = httpx.get(f"{base}/api/contents", headers=headers, timeout=30).json()
        assert "nightly_gate.ipynb" in {each["name"] for each in found["content"]}
        listening = subprocess.run(
            ["cat", "/proc/net/tcp", "/proc/net/tcp6"], capture_output=True, text=True, check=True
        )
        assert f"00000000:{port:04X} " not in listening.stdout, "not on every address"
        assert f"0100007F:{port:04X} " in listening.stdout
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(base, timeout=2)
