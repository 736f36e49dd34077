"""Keys in a server of its own process: no word of one in anything that a run writes, and what it used outlives the run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from workbench.cli import main

pytestmark = [pytest.mark.full, pytest.mark.timeout(300)]
QUIET = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9/none", "QUIRE_FOLLOW": "", "QUIRE_LOG_LEVEL": "debug"}
QUESTION = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 10}


def test_a_runs_key_is_nowhere_and_its_use_outlives_the_run(
    quire: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "home"
    make = [
        "keys",
        "create",
        "ci",
        "--right",
        "infer",
        "--daily-tokens",
        "60",
        "--json",
        "--home-dir",
        str(home),
    ]
    assert main(make) == 0
    made = json.loads(capsys.readouterr().out)
    key, secret = made["key"], made["key"].rpartition("-")[2]
    headers = {"authorization": f"Bearer {key}"}
    command_lines, printed, statuses = b"", "", []
    for _ in range(2):
        running = quire("serve", **QUIET, QUIRE_API_KEY=key)
        running.wait_line("is ready")
        assert running.get("/v1/models").status_code == 401
        while True:
            answer = httpx.post(
                f"{running.url}/v1/chat/completions", json=QUESTION, headers=headers, timeout=30
            )
            statuses.append(answer.status_code)
            if answer.status_code != 200:
                break
        assert answer.json()["error"]["param"] == "daily_tokens"
        for pid in (running.process.pid, *running.descendants()):
            command_lines += Path(f"/proc/{pid}/cmdline").read_bytes()
        running.close()
        printed += "\n".join(running.lines)
    assert statuses[:2] == [200, 200]
    assert statuses[-2:] == [429, 429], "the second run knows what the first one used"
    assert statuses.count(429) == 2
    assert secret not in printed
    assert secret.encode() not in command_lines
    for file in home.rglob("*"):
        assert not file.is_file() or secret.encode() not in file.read_bytes(), file
