"""`quire up` as a process: ready, restarted after SIGKILL, gone without a trace, two of them side by side."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from workbench import exit_codes
from workbench.child import Child
from workbench.ports import free_port

NO_MLFLOW = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9/none"}  # an MLflow of one's own: no child for it


REGISTER = """
import sys
from pathlib import Path
from workbench.settings import Settings
from workbench.versions.registry import Registry

home, uri, *folders = sys.argv[1:]
registry = Registry(Settings(home_dir=Path(home), mlflow_tracking_uri=uri))
for folder in folders:
    registry.register("tickets", base=Path(folder))
"""


@pytest.mark.full
def test_two_run_side_by_side_with_pages_api_and_mlflow_and_leave_nothing(
    quire: Callable[..., Any], proc: Any, tiny_model: Path, other_model: Path
) -> None:
    one = quire("up", home="one", QUIRE_FOLLOW="tickets@champion")
    two = quire("up", home="two", **NO_MLFLOW)
    for each in (one, two):
        assert each.url in each.wait_line("Quire is at")
        each.wait_line("is ready")
        page = each.get("/")
        assert (page.status_code, page.headers["content-type"].split(";")[0]) == (200, "text/html")
        assert each.get("/v1/models").json()["data"][0]["id"] == "fake-echo"
        assert each.get("/v1/nothing").status_code == 404  # not the page's HTML
        assert each.app()["url"] == each.url
    one.wait_line("MLflow is at", 180)
    mlflow = f"http://127.0.0.1:{one.mlflow_port}/mlflow"
    assert httpx.get(f"{mlflow}/health", timeout=30).status_code == 200
    assert "<html" in httpx.get(f"{mlflow}/", timeout=30).text.lower()
    assert (one.home / "mlflow" / "mlflow.db").is_file()
    assert (one.home / "quire.db").is_file()
    assert "<html" in one.get("/mlflow/").text.lower()
    assert two.get("/mlflow/").status_code == 503
    check_alias_reaches_the_app(one, [tiny_model, other_model], proc)
    assert (one.home / "logs" / "scheduler.log").read_text() == "", (
        "the scheduler has nothing to complain about"
    )
    assert proc.is_free(two.mlflow_port), "an MLflow was named, so none is started"
    children = {each: each.descendants() for each in (one, two)}
    assert len(children[one]) >= 4  # app, guard, MLflow, scheduler
    for each in (one, two):
        assert each.stop() < 10
        assert each.process.returncode == 0
        assert not proc.alive(children[each])
        assert proc.is_free(each.port)
        assert proc.is_free(each.mlflow_port)
        assert not (each.home / "run" / "app.json").exists()


def check_alias_reaches_the_app(running: Any, folders: list[Path], proc: Any) -> None:
    """Register and move an alias through the app's own port, as somebody in MLflow's UI behind a tunnel would."""
    uri = f"{running.url}/mlflow"
    command = [sys.executable, "-c", REGISTER, str(running.home), uri, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    for version in (1, 2):
        alias = {"name": "tickets", "alias": "champion", "version": str(version)}
        moved = httpx.post(f"{uri}/api/2.0/mlflow/registered-models/alias", json=alias, timeout=30)
        assert moved.status_code == 200, moved.text

        def serves(wanted: int = version) -> bool:
            models = {each["id"]: each for each in running.get("/v1/models").json()["data"]}
            return models.get(f"tickets/{wanted}", {}).get("aliases") == ["tickets@champion"]

        assert proc.eventually(serves, 5.0 if version > 1 else 30.0)  # the first load imports MLflow
    body = {"model": "tickets@champion", "prompt": "hi", "max_tokens": 3}
    answer = httpx.post(f"{running.url}/v1/completions", json=body, timeout=30).json()
    assert answer["usage"]["completion_tokens"] == 3


def test_a_killed_app_is_started_again_on_the_same_port(quire: Callable[..., Any], fault: Any) -> None:
    running = quire("up", **NO_MLFLOW)
    running.wait_line("is ready")
    before = running.app()["pid"]
    os.kill(before, signal.SIGKILL)
    # The supervisor holds the port: this request waits for the new app instead of being refused.
    assert running.get("/v1/models").status_code == 200
    assert "SIGKILL" in running.wait_line("ended")
    running.wait_line("is ready")
    assert running.app()["pid"] != before
    answer = httpx.post(
        f"{running.url}/v1/completions", json={"prompt": "hi", "max_tokens": 4}, timeout=60
    ).json()
    assert answer["usage"]["completion_tokens"] == 4
    assert running.stop() < 10
    fault(
        "SIGKILL of the app", fails="what it was answering: the connection breaks; newcomers wait for the new app on the same port",
        goes_on="MLflow and the scheduler; the app is started again", afterwards="everything that was acknowledged",
    )  # fmt: skip


@pytest.mark.full
def test_a_killed_mlflow_is_started_again_and_missed_by_nobody_else(
    quire: Callable[..., Any], proc: Any, fault: Any
) -> None:
    running = quire("up", QUIRE_FOLLOW="")
    running.wait_line("is ready")
    running.wait_line("MLflow is at", 180)
    for pid in running.descendants():
        with suppress(OSError):
            if b"mlflow\0server" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
    down = running.get("/mlflow/api/2.0/mlflow/experiments/get?experiment_id=0")
    body = {"prompt": "hi", "max_tokens": 4}
    assert httpx.post(f"{running.url}/v1/completions", json=body, timeout=60).status_code == 200
    assert running.get("/readyz").status_code == 200
    assert "starting it again" in running.wait_line("The MLflow process ended")
    running.wait_line("MLflow is at", 180)
    again = running.get("/mlflow/api/2.0/mlflow/experiments/get?experiment_id=0")
    assert again.json()["experiment"]["name"] == "Default"
    fault(
        "SIGKILL of MLflow", fails=f"what goes to MLflow: {down.status_code} `{down.json()['error']['code']}`",
        goes_on="requests, pages, jobs that do not need it, feedback; it is started again", afterwards="what MLflow had stored",
    )  # fmt: skip


def test_a_killed_supervisor_takes_its_children_with_it(
    quire: Callable[..., Any], proc: Any, fault: Any
) -> None:
    running = quire("up", **NO_MLFLOW)
    running.wait_line("is ready")
    children = running.descendants()
    assert children
    running.stop(signal.SIGKILL)
    assert proc.eventually(lambda: not proc.alive(children))
    assert proc.is_free(running.port)
    fault(
        "SIGKILL of the supervisor", fails="everything: the app, MLflow and the scheduler end with it", goes_on="nothing",
        afterwards="no process and no port in use; everything that was acknowledged",
    )  # fmt: skip


def test_a_running_stream_ends_in_order_when_the_app_is_told_to_stop(quire: Callable[..., Any]) -> None:
    running = quire("serve")
    running.wait_line("is ready")
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": 60}
    with httpx.stream("POST", f"{running.url}/v1/chat/completions", json=body, timeout=30) as response:
        lines = response.iter_lines()
        assert "assistant" in next(lines)
        running.process.send_signal(signal.SIGTERM)
        rest = list(lines)
    assert rest[-2:] == ["data: [DONE]", ""] or rest[-1] == "data: [DONE]"
    assert running.process.wait(10) == 0


DYING_APP = """
from functools import partial
import sys
from engine.errors import EngineDeadError
from workbench import app, settings
from workbench.host import fake_worker
from workbench.ports import bind

chosen = settings.load()
settings.prepare_home(chosen)
factory = partial(fake_worker, delay_s=0.0, fail_at={0: EngineDeadError("device lost")})
announce = lambda event, **facts: print(event, flush=True)
sys.exit(app.serve(chosen, with_ui=False, listener=bind(chosen.host, chosen.port), announce=announce, factory=factory))
"""


def test_the_app_leaves_with_its_own_code_when_the_engine_dies(tmp_path: Path, fault: Any) -> None:
    port = free_port()
    env = {**os.environ, "PORT": str(port), "HOME_DIR": str(tmp_path / "home"), "QUIRE_FAKE": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", DYING_APP], env=env, stdout=subprocess.PIPE, text=True
    ) as app:
        assert app.stdout is not None
        assert [app.stdout.readline().strip() for _ in range(2)] == ["listening", "loaded"]
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json={"prompt": "hi"}, timeout=30)
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
        assert "device lost" in answer.json()["error"]["message"]
        assert app.wait(20) == exit_codes.ENGINE_DEAD
    error = answer.json()["error"]
    fault(
        "broken device context", fails=f"everything of that engine: {answer.status_code} `{error['code']}` with the device's message",
        goes_on="nothing in that process", afterwards=f"it leaves with exit code {app.returncode} and is started again",
    )  # fmt: skip


HANGING_APP = """
import ctypes, sys, time
from workbench import app, settings
from workbench.host import fake_worker
from workbench.ports import bind

def hanging(config, **hooks):
    worker = fake_worker(config, delay_s=0.0, **hooks)
    runner = worker._engine._runner
    collect = runner.collect

    def collect_or_hang():
        if len(runner.plans) > 20:
            {hang}
        return collect()

    runner.collect = collect_or_hang
    return worker

chosen = settings.load()
settings.prepare_home(chosen)
announce = lambda event, **facts: print(event, flush=True)
sys.exit(app.serve(chosen, with_ui=False, listener=bind(chosen.host, chosen.port), announce=announce, factory=hanging))
"""


@pytest.mark.full
@pytest.mark.parametrize(
    ("hang", "code"),
    [
        pytest.param("time.sleep(600)", exit_codes.ENGINE_DEAD, id="in Python"),
        pytest.param("ctypes.PyDLL(None).sleep(600)", 1, id="with the interpreter"),
    ],
)
def test_an_app_whose_step_hangs_leaves_and_says_where(tmp_path: Path, hang: str, code: int) -> None:
    port = free_port()
    env = {**os.environ, "PORT": str(port), "HOME_DIR": str(tmp_path / "home"), "QUIRE_FAKE": "1",
           "QUIRE_STEP_TIMEOUT_SECONDS": "4", **NO_MLFLOW}  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-c", HANGING_APP.replace("{hang}", hang)], env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as app:  # fmt: skip
        assert app.stdout is not None
        assert app.stderr is not None
        assert [app.stdout.readline().strip() for _ in range(2)] == ["listening", "loaded"]
        address = f"http://127.0.0.1:{port}/v1/completions"
        assert httpx.post(address, json={"prompt": "hi", "max_tokens": 4}, timeout=30).status_code == 200
        if code == exit_codes.ENGINE_DEAD:
            answer = httpx.post(
                address, json={"prompt": "hi", "max_tokens": 90, "ignore_eos": True}, timeout=30
            )
            assert answer.status_code == 500
            assert "no step succeeded for" in answer.json()["error"]["message"]
        else:
            with pytest.raises(httpx.HTTPError):
                httpx.post(address, json={"prompt": "hi", "max_tokens": 90, "ignore_eos": True}, timeout=30)
        assert app.wait(20) == code
        assert "collect_or_hang" in app.stderr.read(), "the traceback of the thread that hangs"


def test_serve_has_the_api_and_no_pages(quire: Callable[..., Any]) -> None:
    running = quire("serve", "--json")
    running.wait_line('"event": "loaded"')
    assert running.get("/readyz").status_code == 200
    assert running.get("/").status_code == 404
    assert running.stop(signal.SIGINT) < 10


def test_pages_refuse_web_sockets_of_other_sites(up: Any) -> None:
    from websockets.exceptions import InvalidStatus
    from websockets.sync.client import connect

    address = f"ws://127.0.0.1:{up.port}/_stcore/stream"
    with connect(address, origin=up.url):
        pass
    with pytest.raises(InvalidStatus) as caught:
        connect(address, origin="https://evil.example")
    assert caught.value.response.status_code == 403


def test_pages_refuse_other_host_names(up: Any) -> None:
    assert httpx.get(up.url, headers={"host": "evil.example"}).status_code == 403


def test_streams_pass_the_pages_middleware_token_by_token(up: Any) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": 60}
    headers = {"accept-encoding": "gzip"}
    with httpx.stream(
        "POST", f"{up.url}/v1/chat/completions", json=body, headers=headers, timeout=30
    ) as response:
        assert "content-encoding" not in response.headers
        pieces = list(response.iter_raw())
    assert len(pieces) > 2  # 60 tokens, 5 ms apart: some may share a packet, all never


def test_a_client_that_leaves_is_noticed_behind_the_pages(up: Any, proc: Any) -> None:
    body = {
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "max_tokens": 1500,
        "ignore_eos": True,
    }
    with httpx.stream("POST", f"{up.url}/v1/chat/completions", json=body, timeout=30) as response:
        pieces = response.iter_raw()  # kept: its end would close the connection
        next(pieces)
        assert proc.eventually(lambda: running_requests(up) == 1)
    assert proc.eventually(lambda: running_requests(up) == 0, 3.0)


def running_requests(up: Any) -> int:
    for line in up.get("/metrics").text.splitlines():
        if line.startswith("quire:num_requests_running{"):
            return int(float(line.split()[-1]))
    raise AssertionError("no such metric")


def test_a_home_in_use_is_refused_with_the_owner(up: Any) -> None:
    env = {**os.environ, "HOME_DIR": str(up.home), "PORT": str(free_port()), "QUIRE_FAKE": "1", **NO_MLFLOW}
    command = [sys.executable, "-m", "workbench.cli", "up"]
    second = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert second.returncode == 2
    assert str(up.process.pid) in second.stderr
    assert "Traceback" not in second.stderr
    assert up.get("/healthz").status_code == 200


def test_the_guard_ends_a_whole_tree(proc: Any) -> None:
    tree = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); print(1, flush=True); time.sleep(60)"
    guard = subprocess.Popen(
        [sys.executable, "-m", "workbench.guard", str(os.getpid()), "--", sys.executable, "-c", tree],
        stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert guard.stdout is not None
    assert guard.stdout.readline()
    pids = {guard.pid} | _group(guard.pid)
    assert len(pids) == 3
    guard.terminate()
    guard.wait(10)
    guard.stdout.close()
    assert proc.eventually(lambda: not proc.alive(pids))


def _group(pgid: int) -> set[int]:
    return {
        int(entry.name)
        for entry in os.scandir("/proc")
        if entry.name.isdigit() and _pgid(int(entry.name)) == pgid
    }


def _pgid(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except OSError:
        return -1


def test_only_starts_that_fail_are_waited_for_longer_and_longer():
    """A child that had come up and was killed is back at once, however often; one that never comes up is not hurried."""
    child = Child("app", ["true"], {}, started_at=time.monotonic())
    failing = [child.plan_restart() for _ in range(8)]
    assert failing == sorted(failing)
    assert failing[-1] >= 10 * failing[0]
    child.has_come_up()
    assert child.plan_restart() == failing[0]
