"""Adapters over HTTP: loaded as vLLM loads them, named like models, never answered from stale KV, and told apart in the records."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.config import EngineConfig
from workbench.cli import main
from workbench.host import load_worker
from workbench.observe.request_log import RequestLog
from workbench.run_state import RunState
from workbench.services import Services
from workbench.settings import Settings
from workbench.versions.adapter import adapter_digest
from workbench.versions.digest import folder_digest
from workbench.versions.merge import merged_digest

PROMPT = list(range(20, 70))  # three whole blocks


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    (folder / "models").mkdir()
    return folder


@pytest.fixture(scope="module")
def server(serve: Any, tiny_model: Path, home: Path) -> Iterator[Any]:
    """The real engine, with a request log; adapters may be loaded from the HOME_DIR's models."""
    services = Services(Settings(home_dir=home, allow_runtime_lora_updating=True, follow=""))
    services.open()
    config = EngineConfig(
        model=str(tiny_model),
        dtype="float32",
        deterministic=True,
        device="cpu",
        num_blocks=512,
        num_threads=1,
    )
    with serve(load_worker, config, services=services) as running:
        (home / "run").mkdir(exist_ok=True)
        RunState(home / "run").write(running.url, model=running.model, token=running.token)
        yield running


@pytest.fixture
def load(server: Any) -> Iterator[Callable[..., Any]]:
    """``load(name, path, **more)``: the response; what was loaded goes with the test."""
    names = set()

    def post(name: Any, path: Any, **more: Any) -> Any:
        names.add(name)
        return server.http.post(
            "/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path), **more}
        )

    yield post
    for name in names:
        server.http.post("/v1/unload_lora_adapter", json={"lora_name": name})


def answer(server: Any, model: str, **more: Any) -> tuple[str, int]:
    """Text and how many prompt tokens came from the cache."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": 24, "temperature": 0, "ignore_eos": True, **more}
    told = server.http.post("/v1/completions", json=body)
    assert told.status_code == 200, told.text
    usage = told.json()["usage"]
    return told.json()["choices"][0]["text"], usage["prompt_tokens_details"]["cached_tokens"]


def test_an_adapter_is_loaded_listed_named_and_unloaded(
    server: Any, load: Any, adapter: Any, home: Path, tiny_model: Path
) -> None:
    folder = adapter(home / "models" / "sql", 1)
    told = load("sql-lora", "sql")  # as it lies below the root
    assert (told.status_code, told.text) == (200, "Success: LoRA adapter 'sql-lora' added successfully.")
    card = server.http.get("/v1/models/sql-lora").json()
    digest = merged_digest(folder_digest(tiny_model), adapter_digest(folder))
    assert (card["parent"], card["root"], card["digest"]) == (server.model, str(folder), digest)
    assert [each["id"] for each in server.http.get("/v1/models").json()["data"]] == [server.model, "sql-lora"]
    assert answer(server, "sql-lora")[0] != answer(server, server.model)[0]

    again = load("sql-lora", folder)
    assert (again.status_code, again.json()["error"]["code"]) == (409, "model_in_use")
    assert load(server.model, folder).status_code == 409
    gone = server.http.post("/v1/unload_lora_adapter", json={"lora_name": "sql-lora"})
    assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'sql-lora' removed successfully.")
    body = {"model": "sql-lora", "prompt": PROMPT}
    assert server.http.post("/v1/completions", json=body).json()["error"]["code"] == "model_not_found"
    for name in ("sql-lora", server.model):
        refused = server.http.post("/v1/unload_lora_adapter", json={"lora_name": name})
        assert (refused.status_code, refused.json()["error"]["param"]) == (404, "lora_name")


def test_an_adapter_loaded_again_with_other_weights_never_sees_stale_kv(
    server: Any, load: Any, adapter: Any, home: Path, tmp_path: Path
) -> None:
    one, other, folder = (
        adapter(tmp_path / "one", 1),
        adapter(tmp_path / "other", 2),
        home / "models" / "again",
    )
    shutil.copytree(one, folder)
    load("again", folder)
    first, _ = answer(server, "again")
    assert answer(server, "again") == (first, 48), "the same weights find their own blocks"
    shutil.copytree(other, folder, dirs_exist_ok=True)
    assert load("again", folder, load_inplace=True).status_code == 200
    second, num_cached = answer(server, "again")
    assert num_cached == 0
    assert second != first
    assert second == answer(server, "again", cache_salt="nobody has used this one")[0]
    shutil.copytree(one, folder, dirs_exist_ok=True)
    assert load("again", folder, load_inplace=True).status_code == 200
    assert answer(server, "again") == (first, 48), "and the first ones find theirs again"


def test_a_request_is_its_adapters_in_log_and_metrics(
    server: Any, load: Any, adapter: Any, home: Path, eventually: Any
) -> None:
    load("logged", adapter(home / "models" / "logged", 3))
    digest = server.http.get("/v1/models/logged").json()["digest"]

    def told() -> dict[tuple[str, str], float]:
        families = text_string_to_metric_families(server.http.get("/metrics").text)
        return {
            (sample.name.removeprefix("quire:"), sample.labels["model_name"]): sample.value
            for family in families
            for sample in family.samples
            if "model_name" in sample.labels
            and sample.labels.get("finished_reason", "length") == "length"
            and "le" not in sample.labels
        }

    before = told()
    answer(server, "logged")
    after = told()
    assert after["request_success_total", "logged"] == 1
    assert after["time_to_first_token_seconds_count", "logged"] == 1
    assert after["request_success_total", server.model] == before["request_success_total", server.model]
    assert (
        after["generation_tokens_total", server.model] == before["generation_tokens_total", server.model] + 24
    )
    assert ("generation_tokens_total", "logged") not in after, "tokens are counted by engine"
    row = RequestLog.read(home, limit=1).iloc[0]
    assert (row["model"], row["version_digest"], row["num_output_tokens"]) == ("logged", digest, 24)
    headers = {"authorization": f"Bearer {server.token}"}
    scores = [
        server.http.post("/quire/score", json={"model": name, "texts": [PROMPT]}, headers=headers).json()[
            "scores"
        ]
        for name in ("logged", server.model)
    ]
    assert scores[0] != scores[1]
    records = server.http.get("/quire/records?model=logged", headers=headers).json()["requests"]
    assert [each["num_output_tokens"] for each in records] == [24, 0]  # scoring generates nothing


def test_a_path_never_leaves_the_roots_and_nothing_is_told_of_what_lies_there(
    server: Any, load: Any, adapter: Any, home: Path, tmp_path: Path
) -> None:
    outside, root = adapter(tmp_path / "outside", 1), home / "models"
    (root / "link").symlink_to(outside)
    (root / "linked-files").mkdir()
    for file in outside.iterdir():
        (root / "linked-files" / file.name).symlink_to(file)
    (root / "circle").symlink_to(root / "circle")
    for path in (
        outside, "/etc", root, ".", "..", "../models/../..", f"../../{tmp_path.name}/outside", "link", "linked-files",
        "circle", "missing", "a\0b", "x" * 5000, "~", "",
    ):  # fmt: skip
        told = load("bad", path)
        error = told.json()["error"]
        assert (told.status_code, error["param"], error["code"]) == (400, "lora_path", "invalid_request"), (
            path
        )
        assert "is no folder of an adapter that this server may read" in error["message"]
    for name in ("t@champion", "t/1", "t:1", "", "../x", "a b"):
        assert load(name, "link").json()["error"]["param"] == "lora_name"
    assert len(server.host.resident()) == 1


def test_files_that_are_no_adapter_of_this_base_are_refused_while_requests_run(
    server: Any, load: Any, adapter: Any, home: Path
) -> None:
    root = home / "models"
    short = adapter(root / "short", 1)
    weights = short / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    adapter(root / "rank", 1, rank=17)
    adapter(root / "other", 1, base_digest="f" * 64)
    for path, status, code in (
        ("short", 400, "invalid_adapter"), ("rank", 422, "adapter_unsupported"), ("other", 400, "wrong_base"),
    ):  # fmt: skip
        told = load("bad", path)
        assert (told.status_code, told.json()["error"]["code"]) == (status, code)
    assert len(server.host.resident()) == 1


def test_loading_at_run_time_is_off_unless_it_is_allowed(serve: Any) -> None:
    from workbench.host import fake_worker

    with serve(fake_worker) as closed:
        for path in ("load", "unload"):
            told = closed.http.post(f"/v1/{path}_lora_adapter", json={"lora_name": "a", "lora_path": "b"})
            assert (told.status_code, told.json()["error"]["code"]) == (403, "forbidden")
            assert "QUIRE_ALLOW_RUNTIME_LORA_UPDATING" in told.json()["error"]["message"]


def test_a_model_sleeps_and_wakes_by_command_and_requests_say_how(
    server: Any, load: Any, adapter: Any, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load("sleepy", adapter(home / "models" / "sleepy", 4))
    before = answer(server, "sleepy")[0]

    def quire(*arguments: str) -> dict[str, Any]:
        assert main(["models", *arguments, "--home-dir", str(home), "--json"]) == 0
        return dict(json.loads(capsys.readouterr().out.splitlines()[-1]))

    listed = quire("list")["residents"]
    parents = {each["id"]: each["parent"] for each in listed}
    assert (parents[server.model], parents["sleepy"]) == (None, server.model)
    assert quire("sleep", server.model)["phase"] == "sleeping"
    for model in (server.model, "sleepy"):
        told = server.http.post("/v1/completions", json={"model": model, "prompt": PROMPT})
        assert (told.status_code, told.json()["error"]["code"]) == (503, "model_asleep")
        assert "quire models wake" in told.json()["error"]["message"]
    headers = {"authorization": f"Bearer {server.token}"}
    assert server.http.get("/quire/is_sleeping", headers=headers).json() == {"is_sleeping": True}
    assert server.http.get("/healthz").status_code == 200, "a restart would not help"
    assert server.http.get("/readyz").status_code == 503
    assert [each["id"] for each in server.http.get("/v1/models").json()["data"]] == [server.model, "sleepy"]
    assert main(["models", "sleep", "sleepy", "--home-dir", str(home)]) == 2
    assert f"Name {server.model}" in capsys.readouterr().err
    assert quire("wake", server.model)["phase"] == "ready"
    assert answer(server, "sleepy")[0] == before
    assert quire("unload", "sleepy") == {}
    assert len(server.host.resident()) == 1
