"""Engines over several processes beside engines of one: same tokens, whatever the settings; and every way in which ranks end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.build import build_engine, resolve_config
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import ConfigError, CorruptWeightsError, EngineDeadError, ModelNotFoundError
from engine.memory import DeviceMemory
from engine.models.transformers_config import read_model_config
from engine.parallel.settings import check_files, settle_for_ranks
from engine.sampling_params import SamplingParams
from engine.worker import EngineWorker
from tests.engine.models.conftest import Run, make_tiny, random_prompt, run_requests

ROOT = Path(__file__).resolve().parents[3]
GREEDY = SamplingParams(max_tokens=16, temperature=0.0, logprobs=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four heads, two of K and V."""
    made = tmp_path_factory.mktemp("qwen2")
    make_tiny("qwen2_full", made)
    return made


def config_of(folder: Path, **settings: Any) -> EngineConfig:
    return EngineConfig(
        model=str(folder), dtype="float64", device="cpu", num_blocks=64, block_size=4, num_threads=1,
        **{"tensor_parallel_size": 2, **settings},
    )  # fmt: skip


def rank_processes() -> list[int]:
    """Ranks that this process started."""
    mine = []
    for each in Path("/proc").glob("[0-9]*"):
        try:
            command, status = (each / "cmdline").read_text(), (each / "stat").read_text()
        except OSError:  # it has ended
            continue
        if (
            "engine.parallel.rank_process" in command
            and int(status.rpartition(")")[2].split()[1]) == os.getpid()
        ):
            mine.append(int(each.name))
    return mine


def eventually(condition: Callable[[], bool], timeout_s: float = 20.0) -> bool:
    """Whether a condition comes true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def steps_until_dead(engine: Engine) -> str:
    """What the engine says when a step raises."""
    try:
        for _ in range(1000):
            engine.step()
    except EngineDeadError as error:
        return str(error)
    raise AssertionError("the engine lives on")


@pytest.mark.parametrize(
    ("setting", "value", "what"),
    [
        ("quantization", "int8", "quantized products are not split"),
        ("enable_lora", True, "adapters are not split"),
        ("deterministic", True, "not proven to have the same bits"),
    ],
)
def test_settings_that_several_ranks_do_not_have_are_refused_before_any_work(
    folder: Path, setting: str, value: object, what: str
) -> None:
    with pytest.raises(ConfigError, match=what) as raised:
        build_engine(config_of(folder, **{setting: value}))
    assert raised.value.param == setting
    assert rank_processes() == []


def test_a_gguf_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    check_files(file, 1)
    with pytest.raises(ConfigError, match=r"model.gguf is a GGUF file, which is not split"):
        check_files(file, 2)


def test_more_ranks_than_gpus_are_refused() -> None:
    config = EngineConfig(model="m", tensor_parallel_size=64)
    with pytest.raises(ConfigError, match="tensor_parallel_size 64: "):
        settle_for_ranks(config, torch.device("cuda:0"))


def test_ranks_on_one_cpu_share_its_memory_and_cores(folder: Path) -> None:
    model, memory = read_model_config(folder), DeviceMemory(200 << 20, 200 << 20)
    whole = resolve_config(EngineConfig(model=str(folder), device="cpu"), model, memory)
    half = resolve_config(
        EngineConfig(model=str(folder), device="cpu", tensor_parallel_size=2), model, memory
    )
    assert half.num_threads == max(1, (whole.num_threads or 0) // 2)
    # A quarter of what is left is for KV, of all ranks together.
    assert 0 < 2 * (half.kv_memory_bytes or 0) < memory.free_bytes / 4


# From here on every test starts processes, which take seconds each.


def both(folder: Path, size: int = 2, **settings: Any) -> tuple[Run, Run]:
    """What one process does with the requests, and several."""
    prompts = {f"r{i}": [*random_prompt(12), *random_prompt(3 + 9 * i, i)] for i in range(5)}
    params = {
        name: GREEDY if i % 2 else SamplingParams(max_tokens=20, temperature=0.9, seed=i, prompt_logprobs=1, top_k=20)
        for i, name in enumerate(prompts)
    }  # fmt: skip
    arrive_at = {"r3": 3, "r4": 12}
    runs = [
        run_requests(folder, prompts, params, arrive_at=arrive_at, tensor_parallel_size=n, **settings) for n in (1, size)
    ]  # fmt: skip
    return runs[0], runs[1]


def check_same(one: Run, several: Run) -> None:
    assert several.tokens == one.tokens
    assert several.cached == one.cached
    for figures in ("logprobs", "prompt_logprobs"):
        for name, entries in getattr(one, figures).items():
            found = [each.logprob for each in getattr(several, figures)[name]]
            # float64 sums in another order
            assert found == pytest.approx([each.logprob for each in entries], abs=1e-9)


@pytest.mark.full
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("mistral_window", {"max_batched_tokens": 16, "block_size": 8}),
        ("qwen2_full", {"num_blocks": 24, "max_model_len": 96, "max_batched_tokens": 24}),  # preempts
        ("qwen2_full", {"num_blocks": 24, "max_model_len": 96, "swap_space_bytes": 1 << 20}),
        ("llama3_gqa_tied", {"speculative_config": {"min_gain": 0}}),
        ("llama_yarn_biased", {"attention_backend": "reference"}),
    ],
)
def test_two_processes_do_what_one_does(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    make_tiny(family, tmp_path)
    one, two = both(tmp_path, **settings)
    check_same(one, two)
    if settings.get("num_blocks"):
        assert two.preempted == one.preempted != set()


@pytest.mark.full
def test_four_processes_share_two_heads_of_keys(folder: Path) -> None:
    check_same(*both(folder, 4))


@pytest.mark.full
@pytest.mark.parametrize("level", [1, 2])
def test_ranks_sleep_and_wake_together(folder: Path, level: int) -> None:
    engine = build_engine(config_of(folder))

    def ask() -> list[int]:
        engine.add(engine.make_request(random_prompt(20), GREEDY))
        return [
            t
            for _ in range(200)
            if engine.has_work
            for delta in engine.step().deltas
            for t in delta.token_ids
        ]

    try:
        before = ask()
        engine.sleep(level)
        engine.wake_up()
        assert ask() == before
    finally:
        engine.close()
    assert rank_processes() == []


@pytest.mark.full
def test_ranks_that_cannot_wake_up_say_why_and_can_later(folder: Path, tmp_path: Path) -> None:
    engine = build_engine(config_of(folder))
    weights = folder / "model.safetensors"
    away = tmp_path / "away.safetensors"
    try:
        engine.sleep(2)
        weights.rename(away)
        with pytest.raises(ModelNotFoundError, match="safetensors"):
            engine.wake_up()
        assert engine.is_sleeping
        away.rename(weights)
        engine.wake_up()
        engine.add(engine.make_request(random_prompt(20), GREEDY))
        tokens = [
            t
            for _ in range(200)
            if engine.has_work
            for delta in engine.step().deltas
            for t in delta.token_ids
        ]
        assert len(tokens) == 16
    finally:
        engine.close()
        if away.exists():
            away.rename(weights)


@pytest.mark.full
def test_an_engine_whose_rank_ended_while_it_was_idle_is_not_healthy(folder: Path) -> None:
    worker = EngineWorker(build_engine(config_of(folder)))
    worker.start()
    try:
        assert worker.health().ok
        os.kill(rank_processes()[0], signal.SIGTERM)
        assert eventually(lambda: not worker.health().ok)
        assert "rank 1 of 2 was killed by SIGTERM" in worker.health().message
    finally:
        worker.close()


@pytest.mark.full
def test_a_rank_that_hangs_is_not_waited_for_forever(folder: Path) -> None:
    engine = build_engine(config_of(folder, distributed_timeout_seconds=15))
    (rank,) = rank_processes()
    try:
        engine.add(engine.make_request(random_prompt(8), GREEDY))
        engine.step()
        os.kill(rank, signal.SIGSTOP)
        assert "took no part in a step for 15 s" in steps_until_dead(engine)
    finally:
        engine.close()
    assert rank_processes() == []


@pytest.mark.full
def test_two_engines_of_one_process_do_not_meet(folder: Path) -> None:
    engines = [build_engine(config_of(folder)) for _ in range(2)]
    try:
        tokens: list[list[int]] = [[], []]
        for engine in engines:
            engine.add(engine.make_request(random_prompt(20), GREEDY))
        while any(engine.has_work for engine in engines):
            for own, engine in zip(tokens, engines, strict=True):
                own += [t for delta in engine.step().deltas for t in delta.token_ids]
        assert tokens[0] == tokens[1]
        assert len(tokens[0]) == 16
    finally:
        for engine in engines:
            engine.close()


@pytest.mark.full
def test_what_fails_while_loading_leaves_no_process(tmp_path: Path) -> None:
    make_tiny("qwen2_full", tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CorruptWeightsError):
        build_engine(config_of(tmp_path))
    assert rank_processes() == []


@pytest.mark.full
def test_ranks_end_when_the_first_is_killed(folder: Path) -> None:
    code = (
        "import sys, time; from engine import EngineConfig; from engine.build import build_engine;"
        f"engine = build_engine(EngineConfig(model={str(folder)!r}, device='cpu', dtype='float64', num_blocks=64,"
        "tensor_parallel_size=2, num_threads=1)); print('ready', flush=True); time.sleep(600)"
    )
    first = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None
        assert first.stdout.readline().strip() == "ready"
        (rank,) = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    finally:
        first.kill()
        first.communicate()
    assert eventually(lambda: not Path(f"/proc/{rank}").exists())
