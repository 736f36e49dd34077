"""One model twice, with options of its own: asked for on the command line, named apart, and refused before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.config import EngineConfig, SpeculativeConfig
from workbench.cli import main
from workbench.load_options import PLAIN, LoadOptions
from workbench.run_state import RunState

NAMED = "tiny-llama#int8+kv-int8+256-tokens+ngram"
OPTIONS = [
    "--quantization", "int8", "--kv-cache-dtype", "int8", "--max-model-len", "256", "--speculative-config",
    '{"method": "ngram", "num_speculative_tokens": 2}',
]  # fmt: skip


@pytest.fixture
def quire(real_server: Any, tmp_path: Path) -> Iterator[Callable[..., int]]:
    """``quire models …`` for the server's app; its exit code."""
    (tmp_path / "run").mkdir()
    RunState(tmp_path / "run").write(real_server.url, model=real_server.model, token=real_server.token)
    yield lambda *arguments: main(["models", *arguments, "--home-dir", str(tmp_path), "--json"])
    for resident in real_server.host.resident():
        if not resident.is_default:
            real_server.host.unload(resident.id)


def last_json(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return dict(json.loads(capsys.readouterr().out.splitlines()[-1]))


def test_the_same_files_with_options_are_a_resident_of_their_own(
    real_server: Any, quire: Callable[..., int], tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quire("load", str(tiny_model), *OPTIONS) == 0
    loaded = last_json(capsys)
    assert (loaded["id"], loaded["quantization"], loaded["max_model_len"]) == (NAMED, "int8", 256)
    assert loaded["options"]["speculative_config"]["num_speculative_tokens"] == 2
    assert quire("load", str(tiny_model), *OPTIONS) == 0, "it is there already"
    assert last_json(capsys)["id"] == NAMED
    assert quire("list") == 0
    told = capsys.readouterr()
    plain, other = json.loads(told.out.splitlines()[-1])["residents"]
    assert (plain["id"], plain["quantization"], plain["options"]) == ("tiny-llama", None, {})
    assert other["digest"] == plain["digest"]
    for part in ("float32 → int8, KV cache int8, 256 tokens, ngram speculation", "float32, KV cache float32"):
        assert part in told.err
    engine = real_server.host.worker(NAMED).config
    assert (engine.quantization, engine.kv_cache_dtype) == ("int8", "int8")
    assert engine.speculative_config == SpeculativeConfig(num_speculative_tokens=2)
    listed = {each["id"]: each for each in real_server.http.get("/v1/models").json()["data"]}
    assert (listed[NAMED]["quantization"], listed["tiny-llama"]["quantization"]) == ("int8", None)
    for model in ("tiny-llama", NAMED):
        answer = real_server.http.post(
            "/v1/completions", json={"model": model, "prompt": "the cat", "max_tokens": 4, "ignore_eos": True}
        ).json()
        assert (answer["model"], answer["usage"]["completion_tokens"]) == (model, 4)
    assert quire("unload", NAMED) == 0
    assert [each.id for each in real_server.host.resident()] == ["tiny-llama"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--quantization", "int5"], ["int5", "int8, int4, fp8"]),
        (["--kv-cache-dtype", "int5"], ["int5", "fp8"]),
        (["--max-model-len", "5000"], ["5000", "1024"]),
        (["--max-model-len", "0"], ["max_model_len", "at least 1"]),
        (["--speculative-config", "fast"], ["fast", "JSON"]),
        (["--speculative-config", '{"method": "magic"}'], ["magic", "ngram"]),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(
    real_server: Any,
    quire: Callable[..., int],
    tiny_model: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    words: list[str],
) -> None:
    assert quire("load", str(tiny_model), *options) == 2
    told = capsys.readouterr().err
    assert all(word in told for word in words), told
    assert [each.id for each in real_server.host.resident()] == ["tiny-llama"]


@pytest.mark.parametrize(
    ("options", "param"),
    [("int8", "options"), ({"dtype": "float32"}, "dtype"), ({"deterministic": "yes"}, "deterministic"),
     ({"speculative_config": "ngram"}, "speculative_config")],
)  # fmt: skip
def test_the_route_takes_its_own_options_alone(real_server: Any, options: Any, param: str) -> None:
    told = httpx.post(
        f"{real_server.url}/quire/load", json={"ref": "tiny-llama", "options": options},
        headers={"authorization": f"Bearer {real_server.token}"},
    )  # fmt: skip
    assert (told.status_code, told.json()["error"]["param"]) == (400, param)


def test_what_the_host_does_anyway_is_no_option() -> None:
    host = EngineConfig(model="m", quantization="int8", deterministic=True)
    asked = LoadOptions(quantization="int8", deterministic=True, max_model_len=64)
    assert asked.beside(host) == LoadOptions(max_model_len=64)
    assert LoadOptions(quantization="int8").beside(host) == PLAIN
    assert LoadOptions.from_dict(asked.as_dict()) == asked
    assert asked.on(EngineConfig(model="m")).max_model_len == 64
    assert (PLAIN.suffix, LoadOptions(deterministic=True).suffix) == ("", "#deterministic")
