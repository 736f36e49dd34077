"""The command line: what it answers, and that bad input ends with code 2, one message and no traceback."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from workbench import cli
from workbench.host import FAKE_ANSWER
from workbench.ports import bind


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith(("QUIRE_", "MLFLOW_")) or name == "PORT":
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME_DIR", str(tmp_path / "home"))


@pytest.fixture
def server_url() -> Iterator[str]:
    """An API over the fake engine."""
    import uvicorn

    from workbench.app import build_api_app, wire
    from workbench.settings import Settings

    listener = bind("127.0.0.1", 0)
    wiring = wire(Settings(fake=True))
    server = uvicorn.Server(uvicorn.Config(build_api_app(wiring), log_level="error", lifespan="on"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    assert wiring.host.wait(30).ready
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(20)
    listener.close()


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        code = cli.main(arguments)
    except SystemExit as error:  # argparse
        code = int(error.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message of bad input."""
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert "Traceback" not in err
    return err


COMMANDS = ["up", "serve"]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--host", "0.0.0.0", ["0.0.0.0", "127.0.0.1"]),
        ("--port", "70000", ["PORT=70000", "65535"]),
        ("--model", "/no/such/model", ["/no/such/model", "config.json"]),
        ("--dtype", "int7", ["int7", "float32"]),
        ("--threads", "0", ["0"]),
        ("--quantization", "int5", ["int5", "int8"]),
        ("--speculative-config", "fast", ["fast", "JSON"]),
    ],
)
def test_servers_refuse_bad_values_before_any_work(
    capsys: pytest.CaptureFixture[str], command: str, option: str, value: str, words: list[str]
) -> None:
    message = refused(capsys, command, option, value)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("command", COMMANDS)
def test_servers_refuse_a_home_that_is_a_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert "HOME_DIR" in refused(capsys, command, "--home-dir", str(file / "x"))


@pytest.mark.parametrize("command", COMMANDS)
def test_servers_refuse_a_port_in_use(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("QUIRE_FAKE", "1")
    with bind("127.0.0.1", 0) as held:
        port = held.getsockname()[1]
        message = refused(capsys, command, "--port", str(port))
    assert f"port {port} is in use by process {os.getpid()}" in message
    assert "PORT=" in message


def test_up_refuses_a_taken_mlflow_port(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUIRE_FAKE", "1")
    with bind("127.0.0.1", 0) as held, bind("127.0.0.1", 0) as other:
        port, free = held.getsockname()[1], other.getsockname()[1]
        other.close()
        assert "MLFLOW_PORT=" in refused(capsys, "up", "--port", str(free), "--mlflow-port", str(port))


@pytest.mark.parametrize("command", ["up", "serve", "chat"])
def test_damaged_weights_are_refused_by_file(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path, command: str
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "broken"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    extra = ["hi"] if command == "chat" else []
    assert "model.safetensors" in refused(capsys, command, *extra, "--model", str(folder))


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--temperature", "-1"], "temperature"),
        (["--max-tokens", "0"], "max_tokens"),
        (["--top-p", "0"], "top_p"),
        (["--model", "/no/such/model"], "/no/such/model"),
        (["--url", "http://127.0.0.1:9"], "127.0.0.1:9"),
        (["--url", "nonsense"], "nonsense"),
        (["--max-tokens", "many"], "many"),
        (["--typical-p", "2"], "typical_p"),
        (["--logit-bias", "5"], "--logit-bias 42:5"),
        (["--json-schema", "/no/such/file"], "/no/such/file"),
        (["--tools", "/no/such/file"], "/no/such/file"),
        (["--choice", "yes", "--regex", "a+"], "exactly one"),
        (["--model", "ticket-extractor@champion"], "quire up"),
    ],
)
def test_chat_refuses_bad_values(capsys: pytest.CaptureFixture[str], arguments: list[str], word: str) -> None:
    assert word in refused(capsys, "chat", "hi", *arguments)


def test_unknown_commands_and_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "fly" in refused(capsys, "fly")
    assert "--wings" in refused(capsys, "up", "--wings")


def test_a_refusal_with_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "up", "--json", "--host", "0.0.0.0")
    error = json.loads(out.splitlines()[-1])["error"]
    assert (code, error["code"], error["value"], error["param"]) == (
        2,
        "host_refused",
        "0.0.0.0",
        "QUIRE_HOST",
    )
    assert error["remedy"]


def test_one_question_to_a_running_server(capsys: pytest.CaptureFixture[str], server_url: str) -> None:
    code, out, err = run(capsys, "chat", "Hello", "--url", server_url, "--json")
    facts = json.loads(out.splitlines()[-1])
    assert (code, facts["text"], facts["finish_reason"]) == (0, FAKE_ANSWER, "stop")
    assert facts["completion_tokens"] == len(FAKE_ANSWER) + 1
    assert facts["ttft_ms"] > 0
    assert FAKE_ANSWER in err
    code, out, _ = run(capsys, "chat", "Hello", "--url", f"{server_url}/v1", "--max-tokens", "5")
    assert (code, out.strip()) == (0, FAKE_ANSWER[:5].strip())


def test_a_servers_refusal_is_bad_input_too(capsys: pytest.CaptureFixture[str], server_url: str) -> None:
    assert "gpt-9" in refused(capsys, "chat", "hi", "--url", server_url, "--model", "gpt-9")


def test_chat_attaches_to_the_app_of_its_home(
    capsys: pytest.CaptureFixture[str], server_url: str, tmp_path: Path
) -> None:
    from workbench.run_state import RunState

    run_dir = tmp_path / "home" / "run"
    run_dir.mkdir(parents=True)
    RunState(run_dir).write(server_url, model="fake")
    code, out, _ = run(capsys, "chat", "Hello", "--json")
    assert (code, json.loads(out.splitlines()[-1])["model"]) == (0, "fake-echo")


def test_a_conversation_with_an_engine_of_its_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUIRE_FAKE", "1")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\nAgain\n\nnever asked\n"))
    code, out, _ = run(capsys, "chat", "--max-tokens", "300")
    assert (code, out) == (0, f"{FAKE_ANSWER}\n{FAKE_ANSWER}\n")


def test_chat_with_a_real_model(capsys: pytest.CaptureFixture[str], tiny_model: Path) -> None:
    code, out, _ = run(
        capsys, "chat", "the cat", "--model", str(tiny_model), "--max-tokens", "8", "--regex", "[0-9]{3}", "--logprobs", "2",
        "--n", "2", "--temperature", "1", "--seed", "3", "--json",
    )  # fmt: skip
    facts = json.loads(out.splitlines()[-1])
    assert (code, facts["model"]) == (0, "tiny-llama")
    assert 1 <= facts["completion_tokens"] <= 8
    for answer in (facts, *facts["others"]):
        assert re.fullmatch("[0-9]{3}", answer["text"])
        assert [len(token["top_logprobs"]) for token in answer["logprobs"]] == [2] * answer[
            "completion_tokens"
        ]
    assert len(facts["others"]) == 1


def test_a_prompt_over_the_context_is_refused(capsys: pytest.CaptureFixture[str], tiny_model: Path) -> None:
    message = refused(capsys, "chat", "cat " * 3000, "--model", str(tiny_model))
    assert "1023" in message


def findings(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, dict[str, Any]]]:
    code, out, _ = run(capsys, "doctor", "--json", *arguments)
    report = json.loads(out.splitlines()[-1])
    assert report["ok"] == (code == 0)
    return code, {finding["name"]: finding for finding in report["findings"]}


def test_doctor_reports_what_it_looked_at(capsys: pytest.CaptureFixture[str], tiny_model: Path) -> None:
    _, found = findings(capsys, "--model", str(tiny_model))
    assert set(found) >= {
        "python",
        "packages",
        "torch",
        "gpu",
        "cpu",
        "compiler",
        "home",
        "disk",
        "PORT",
        "model",
    }
    assert all(found[name]["level"] == "ok" for name in ("python", "packages", "torch", "home", "model"))
    assert "tiny-llama" in found["model"]["message"]


def test_doctor_fails_with_a_remedy_for_each_finding(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with bind("127.0.0.1", 0) as held:
        monkeypatch.setenv("PORT", str(held.getsockname()[1]))
        code, found = findings(
            capsys, "--model", "/no/such/model", "--home-dir", str(tmp_path / "file" / "x")
        )
    assert code == 1
    for name in ("PORT", "model", "home"):
        assert found[name]["level"] == "error"
        assert found[name]["remedy"]
