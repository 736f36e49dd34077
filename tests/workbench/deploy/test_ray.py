"""`quire deploy ray` with two replicas under load, one of them killed: every accepted request ends, or fails retryably."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from workbench.ports import free_port
from workbench.worker_factory import FAKE_ANSWER

ROOT = Path(__file__).resolve().parents[3]
_START_S = 150
_NUM_REQUESTS = 24


def descendants(pid: int) -> dict[int, str]:
    """Processes below `pid` with their titles."""
    parents, titles = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                titles[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ").strip()
    found, new = set(), {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    return {child: titles.get(child, "") for child in found}


def replicas_of(pid: int) -> list[int]:
    return [child for child, title in descendants(pid).items() if "ServeReplica:quire:Engine" in title]


@pytest.fixture
def deployed(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command, and its address, once both replicas are ready."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("no Ray Serve (pip install 'quire[ray]')")
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="ray-") as short, (tmp_path / "log").open("w") as log:
        command = [
            sys.executable,
            "-m",
            "workbench.cli",
            "deploy",
            "ray",
            "--replicas",
            "2",
            "--cpus",
            "0.5",
            "--json",
        ]
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("QUIRE_", "RAY_"))
        }
        environment |= {
            "PYTHONPATH": str(ROOT), "HOME_DIR": str(tmp_path / "home"), "PORT": str(port), "QUIRE_FAKE": "1",
            "RAY_TMPDIR": short,  # its sockets' paths must be short
        }  # fmt: skip
        for _ in range(3):  # Ray gives its own agent 15 s to start, which a busy machine does not keep
            process = subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
            )
            assert process.stdout is not None
            line = process.stdout.readline()
            if line:
                break
            process.stdout.close()
            process.wait(60)
        assert line, (tmp_path / "log").read_text()[-3000:]
        try:
            yield process, json.loads(line)["url"]
        finally:
            process.terminate()
            process.wait(60)
            process.stdout.close()


async def ask(client: httpx.AsyncClient, number: int, begun: list[int]) -> str:
    """One request of three seconds at least; what became of it. `begun`: those whose answer has begun."""
    body = {
        "model": "fake-echo", "messages": [{"role": "user", "content": f"Request {number}"}], "max_tokens": 600,
        "ignore_eos": True, "stream": number % 2 == 0,
    }  # fmt: skip
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        begun.append(number)
        text = (await answer.aread()).decode()
    if answer.status_code != 200:
        assert answer.status_code in (429, 503), text
        assert int(answer.headers["retry-after"]) > 0
        return "refused"
    if not body["stream"]:
        assert json.loads(text)["choices"][0]["message"]["content"].startswith(FAKE_ANSWER)
        return "whole"
    parts = [part.removeprefix("data: ") for part in text.split("\n\n") if part]
    events = [json.loads(part) for part in parts if part != "[DONE]"]
    if "error" in events[-1]:
        assert events[-1]["error"]["code"] == "replica_lost"
        return "cut"
    assert parts[-1] == "[DONE]"
    said = "".join(event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"])
    assert said.startswith(FAKE_ANSWER)
    return "whole"


async def load_and_kill(url: str, victim: int) -> list[str]:
    """The victim dies when all streams have begun."""
    begun: list[int] = []
    async with httpx.AsyncClient(base_url=url, timeout=120) as client, asyncio.TaskGroup() as clients:
        asked = [clients.create_task(ask(client, number, begun)) for number in range(_NUM_REQUESTS)]
        while sum(number % 2 == 0 for number in begun) < _NUM_REQUESTS // 2:
            await asyncio.sleep(0.01)
        os.kill(victim, signal.SIGKILL)
    return [each.result() for each in asked]


@pytest.mark.full
@pytest.mark.timeout(360)
def test_a_killed_replica_costs_no_request_in_silence(deployed: tuple[subprocess.Popen[str], str]) -> None:
    process, url = deployed
    victim, *others = replicas_of(process.pid)
    assert len(others) == 1
    outcomes = asyncio.run(load_and_kill(url, victim))  # a time limit of each says that none hung
    assert outcomes.count("cut") > 0, "the victim had streams, and what has begun cannot be repeated"
    assert all(outcome != "cut" for outcome in outcomes[1::2]), "only streams can be cut"
    assert outcomes[1::2].count("whole") > 0, "the other replica answers what could be asked again"

    deadline = time.monotonic() + _START_S
    while len(replicas_of(process.pid)) < 2:
        assert time.monotonic() < deadline, "the killed replica was not replaced"
        time.sleep(0.5)
    below = descendants(process.pid)
    process.terminate()
    assert process.wait(60) == 0
    deadline = time.monotonic() + 20
    while left := [pid for pid in below if Path(f"/proc/{pid}").exists() and "Z" not in _state(pid)]:
        assert time.monotonic() < deadline, [below[pid] for pid in left]
        time.sleep(0.2)


def _state(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return "Z"
