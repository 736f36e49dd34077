"""Automatic settings become values; what cannot be is refused with what would fit; closing gives everything back."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.build import build_engine, resolve_config
from engine.config import EngineConfig
from engine.device_choice import cpu_multiplies_bfloat16
from engine.errors import ConfigError, EngineDeadError, OutOfMemoryError
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.models.weights import load_weights
from engine.sampling_params import SamplingParams

MAY_BE_NONE = {
    "quantization", "speculative_config", "tool_call_parser", "reasoning_parser",
    "max_queued_requests", "max_queued_tokens", "max_queue_seconds", "client_weights",
}  # fmt: skip


@pytest.fixture
def folder(tiny_models: Callable[[str], Any]) -> Path:
    found: Path = tiny_models("llama3_gqa_tied").folder
    return found


def config_of(folder: Path, **settings: Any) -> EngineConfig:
    return EngineConfig(model=str(folder), device="cpu", num_threads=1, **settings)


def test_nothing_stays_automatic(folder: Path) -> None:
    config = resolve_config(config_of(folder))
    for setting in fields(config):
        value = getattr(config, setting.name)
        assert value != "auto"
        assert value is not None or setting.name in MAY_BE_NONE, setting.name
    assert config.max_model_len == 256
    assert config.dtype == ("bfloat16" if cpu_multiplies_bfloat16() else "float32")
    assert resolve_config(config) == config


def test_the_default_pool_is_bounded_and_holds_what_can_run_at_once(folder: Path) -> None:
    config = resolve_config(config_of(folder, dtype="float32", max_num_seqs=4))
    assert config.num_blocks == 4 * 256 // 16
    # 3 layers, K and V, 2 heads of 12, 4 bytes
    assert config.kv_memory_bytes == config.num_blocks * 16 * 3 * 2 * 2 * 12 * 4
    many = resolve_config(config_of(folder, dtype="float32", max_num_seqs=1_000_000, max_batched_tokens=512))
    assert many.kv_memory_bytes is not None
    assert many.kv_memory_bytes <= 1 << 30


def test_the_context_is_clipped_to_the_pool(folder: Path) -> None:
    assert resolve_config(config_of(folder, num_blocks=5)).max_model_len == 80
    assert resolve_config(config_of(folder, num_blocks=500)).max_model_len == 256
    by_bytes = resolve_config(config_of(folder, dtype="float32", kv_memory_bytes=20_000))
    assert by_bytes.num_blocks == 20_000 // (16 * 576)


def test_a_context_that_the_pool_cannot_hold_names_settings_that_fit(folder: Path) -> None:
    config = config_of(folder, dtype="float32", num_blocks=5, max_model_len=100)
    with pytest.raises(
        OutOfMemoryError, match=r"needs 7 KV blocks.*num_blocks=7 or more, max_model_len=80 or less"
    ) as caught:
        resolve_config(config)
    assert caught.value.limit == 80
    assert resolve_config(replace(config, max_model_len=80)).num_blocks == 5
    assert resolve_config(replace(config, num_blocks=7)).max_model_len == 100
    in_bytes = replace(config, num_blocks=None, kv_memory_bytes=5 * 9216)
    with pytest.raises(OutOfMemoryError, match=r"kv_memory_bytes=64512 or more"):
        resolve_config(in_bytes)
    assert resolve_config(replace(in_bytes, kv_memory_bytes=64512)).num_blocks == 7


def test_a_context_beyond_the_model_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="context of 256"):
        resolve_config(config_of(folder, max_model_len=257))


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"quantization": "int3"}, "quantization"),
        ({"attention_backend": "triton"}, "attention_backend"),
        ({"attention_backend": "cpu", "dtype": "float64"}, "attention_backend"),
    ],
)
def test_what_the_device_does_not_have_is_refused(folder: Path, settings: dict[str, Any], param: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_config(config_of(folder, **settings))
    assert caught.value.param == param


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "meta"])
def test_an_absent_device_is_refused(folder: Path, device: str) -> None:
    with pytest.raises(ConfigError, match=device):
        resolve_config(EngineConfig(model=str(folder), device=device))


def test_the_number_of_parameters_is_what_the_file_holds(tiny_model: Any) -> None:
    model = ModelConfig.from_folder(tiny_model.folder)
    assert model.num_parameters == sum(p.numel() for p in tiny_model.reference.parameters())


def test_close_gives_the_tensors_back_and_refuses_more(folder: Path) -> None:
    def tensors() -> int:
        gc.collect()
        return sum(1 for o in gc.get_objects() if issubclass(type(o), torch.Tensor))

    counts = []
    for _ in range(3):
        engine = build_engine(config_of(folder, dtype="float32", num_blocks=40))
        engine.add(
            engine.make_request([1, 2, 3], SamplingParams(max_tokens=3, ignore_eos=True), request_id="a")
        )
        while engine.has_work:
            engine.step()
        engine.close()
        engine.close()
        counts.append(tensors())
    assert counts[2] <= counts[0], "the second cycle keeps more than the first"
    with pytest.raises(EngineDeadError):
        engine.add(engine.make_request([1], SamplingParams(), request_id="b"))


def test_progress_is_told_from_start_to_ready(folder: Path) -> None:
    told: list[tuple[str, float]] = []
    build_engine(
        config_of(folder, num_blocks=20), progress=lambda message, share: told.append((message, share))
    ).close()
    assert [share for _, share in told] == sorted(share for _, share in told)
    assert told[0][1] == 0.0
    assert told[-1] == ("ready", 1.0)
    assert any("model.safetensors" in message for message, _ in told)


def test_end_of_sequence_ids_come_from_config_and_generation_config(
    tiny_models: Callable[[str], Any],
    tmp_path: Path,
    run_engine: Callable[..., Any],
    prompt_of: Callable[..., list[int]],
) -> None:
    tiny, prompt = tiny_models("mistral_window"), prompt_of(20)
    greedy = SamplingParams(max_tokens=16, temperature=0.0)
    free = run_engine(tiny.folder, {"x": prompt}, greedy).tokens["x"]
    at = next(i for i in range(3, 12) if free[i] not in free[:i])
    end = free[at]
    other = next(i for i in range(97) if i not in free)
    assert len(free) == 16
    by_config = tiny.copy(tmp_path / "a", eos_token_id=end)
    by_generation = tiny.copy(tmp_path / "b")
    (by_generation / "generation_config.json").write_text(f'{{"eos_token_id": [{other}, {end}]}}')
    for folder in (by_config, by_generation):
        assert run_engine(folder, {"x": prompt}, greedy).tokens["x"] == free[: at + 1]
        # Below min_tokens the end cannot be chosen at all.
        later = run_engine(folder, {"x": prompt}, greedy.with_(min_tokens=at + 3)).tokens["x"]
        assert end not in later[: at + 3]
        assert len(later) >= at + 3


def test_weights_are_filled_in_place(folder: Path) -> None:
    decoder = Decoder(
        ModelConfig.from_folder(folder), dtype=torch.float32, device=torch.device("cpu"), max_positions=8
    )
    places = {parameter.data_ptr() for parameter in decoder.parameters()}
    load_weights(decoder, folder)
    assert {parameter.data_ptr() for parameter in decoder.parameters()} == places
