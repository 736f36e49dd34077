"""Which pools fit, and advice that holds: every setting that a refusal names does make the config fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.build import resolve_config
from engine.config import EngineConfig
from engine.errors import EngineError, OutOfMemoryError
from engine.memory import Demand, DeviceMemory, estimate_demand
from engine.models.config import ModelConfig
from engine.pool_size import Measured, PoolSizer

GIB = 1 << 30
MODEL = ModelConfig.from_dict(
    {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    }
)  # fmt: skip
BLOCK_BYTES = {"bfloat16": 2 << 20, "float32": 4 << 20}  # 32 layers, K and V, 8 heads of 128, 16 tokens
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def config_of(**settings: Any) -> EngineConfig:
    defaults = {
        "device": "cpu", "dtype": "bfloat16", "max_model_len": 8192, "num_threads": 1, "attention_backend": "reference",
    }  # fmt: skip
    return EngineConfig(model="8b", **{**defaults, **settings})


def resolve(config: EngineConfig, free: int) -> EngineConfig:
    return resolve_config(config, MODEL, DeviceMemory(2 * free, free))


def refusal(config: EngineConfig, free: int) -> OutOfMemoryError:
    with pytest.raises(OutOfMemoryError) as caught:
        resolve(config, free)
    return caught.value


def needs(config: EngineConfig) -> int:
    """Bytes of a config with a pool that is asked for."""
    resolved = resolve(config, 1 << 50)
    demand = estimate_demand(resolved, MODEL, getattr(torch, resolved.dtype), CPU)
    assert resolved.kv_memory_bytes is not None
    taken = demand.weights_bytes + demand.workspace_bytes + resolved.swap_space_bytes
    return taken + resolved.kv_memory_bytes


def test_a_narrower_cache_is_a_remedy_and_takes_its_scales_along() -> None:
    """Half the bytes and, of int8, four of a scale for each 128 values: what int8 cannot do, fp8 may."""
    config = config_of(num_blocks=10_000)
    blocks = 10_000 * BLOCK_BYTES["bfloat16"]
    for share, expected in ((0.53, "int8"), (0.51, "fp8")):
        free = int((needs(config) - blocks + share * blocks) / 0.99)
        assert f"kv_cache_dtype='{expected}'" in str(refusal(config, free))
        assert resolve(replace(config, kv_cache_dtype=expected), free).num_blocks == 10_000
    assert "kv_cache_dtype" not in str(refusal(config, int((needs(config) - 0.51 * blocks) / 0.99)))


BUSY: dict[str, Any] = {"max_num_seqs": 1024, "max_batched_tokens": 8192}
CASES = {
    # (settings, free bytes, settings that a refusal must name)
    "a pool in blocks, a little too large": (
        {**BUSY, "num_blocks": 4096, "dtype": "float32"}, -(1 << 28), {"num_blocks", "max_num_seqs", "max_batched_tokens", "dtype"},
    ),
    "a pool in bytes, a little too large": (
        {**BUSY, "kv_memory_bytes": 8 * GIB}, -(1 << 28), {"kv_memory_bytes", "max_num_seqs", "max_batched_tokens"},
    ),
    "a pool and a host tier, together a little too large": (
        {**BUSY, "num_blocks": 4096, "swap_space_bytes": 4 * GIB}, -(1 << 28), {"num_blocks", "swap_space_bytes", "max_num_seqs"},
    ),
    "many long rows": (
        {"max_num_seqs": 8192, "max_batched_tokens": 512, "max_model_len": 131072, "num_blocks": 8192}, -GIB, {"max_num_seqs"},
    ),
    "a context beyond the default pool": ({"max_model_len": 6000, "dtype": "float32"}, 64 * GIB, {"num_blocks", "max_model_len", "dtype"}),
    "a context beyond a pool in blocks": ({"num_blocks": 100}, 64 * GIB, {"num_blocks", "max_model_len"}),
    "a context beyond a pool in bytes": ({"kv_memory_bytes": GIB // 2}, 64 * GIB, {"kv_memory_bytes", "max_model_len"}),
    "weights alone are too large": ({"dtype": "float32"}, 24 * GIB, {"dtype"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_setting_that_a_refusal_names_makes_it_fit(case: str) -> None:
    settings, free, expected = CASES[case]
    config = config_of(**settings)
    free = free if free > 0 else needs(config) + free
    error = refusal(config, free)
    sizer = PoolSizer(MODEL, CPU, DeviceMemory(2 * free, free))
    resolved = replace(resolve(config_of(), 1 << 50), num_blocks=None, kv_memory_bytes=None)
    resolved = replace(resolved, kv_cache_dtype=settings.get("dtype", resolved.dtype))
    remedies = sizer.remedies(replace(resolved, **settings))
    assert expected <= {remedy.setting for remedy in remedies}
    for remedy in remedies:
        assert str(remedy) in str(error), "the text names what was computed"
        applied = replace(config, **{remedy.setting: remedy.value})
        found = resolve(applied, free)
        assert found.num_blocks is not None


def test_advice_leaves_room_for_what_moves_between_two_tries() -> None:
    config = config_of(**BUSY, num_blocks=4096)
    free = needs(config) - GIB
    for remedy in PoolSizer(MODEL, CPU, DeviceMemory(2 * free, free)).remedies(config):
        resolve(replace(config, **{remedy.setting: remedy.value}), int(0.995 * free))


def test_advice_is_not_timid() -> None:
    config = config_of(num_blocks=100_000)
    (remedy,) = PoolSizer(MODEL, CPU, DeviceMemory(64 * GIB, 32 * GIB)).remedies(
        replace(resolve(config, 1 << 50), kv_memory_bytes=None)
    )
    assert isinstance(remedy.value, int)
    resolve(replace(config, num_blocks=remedy.value), 32 * GIB)
    refusal(
        replace(config, num_blocks=remedy.value + int(0.02 * 32 * GIB) // BLOCK_BYTES["bfloat16"]), 32 * GIB
    )


def test_a_refusal_says_what_takes_the_bytes() -> None:
    error = refusal(config_of(num_blocks=100_000), 32 * GIB)
    assert "weights 14.96 GiB" in error.message
    assert "workspace" in error.message
    assert "100000 blocks" in error.message
    assert "32 GiB of 64 GiB are free" in error.message
    assert error.value == 100_000 * BLOCK_BYTES["bfloat16"]


@pytest.mark.parametrize(
    ("asked", "free", "limit"), [(40 * GIB + 1, 40 * GIB, 40 * GIB), (100, 64 * GIB, 2 << 20)]
)
def test_a_host_tier_that_the_host_cannot_hold_or_that_holds_nothing_is_refused(
    asked: int, free: int, limit: int
) -> None:
    with pytest.raises(EngineError) as caught:
        resolve(config_of(swap_space_bytes=asked), free)
    assert (caught.value.param, caught.value.value, caught.value.limit) == ("swap_space_bytes", asked, limit)
    assert f"swap_space_bytes={limit} or {'less' if asked > limit else 'more'}" in str(caught.value)


def test_a_host_tier_holds_blocks_of_the_cache_as_it_is_stored() -> None:
    block = BLOCK_BYTES["bfloat16"] // 2  # in fp8
    assert (
        resolve(config_of(kv_cache_dtype="fp8", swap_space_bytes=block), 64 * GIB).swap_space_bytes == block
    )


def test_on_a_cpu_the_host_tier_is_taken_from_the_same_memory() -> None:
    error = refusal(config_of(num_blocks=4096, swap_space_bytes=30 * GIB), 40 * GIB)
    assert "host tier 30 GiB" in error.message
    resolve(config_of(num_blocks=4096), 40 * GIB)


def test_a_refused_context_says_what_takes_the_bytes() -> None:
    error = refusal(config_of(max_model_len=100_000), 64 * GIB)
    assert "weights 15.01 GiB and workspace" in error.message
    assert "of 64 GiB" in error.message
    # All 6,250 blocks of it are 12.2 GiB and would fit, were they asked for.
    assert "num_blocks=6250 or more, max_model_len=8192 or less" in str(error)


def test_where_nothing_helps_the_refusal_says_so() -> None:
    assert "Use a smaller model" in str(refusal(config_of(), 8 * GIB))


def test_a_measured_workspace_gives_the_rest_to_the_pool() -> None:
    memory = DeviceMemory(80 * GIB, 70 * GIB)
    asked = EngineConfig(
        model="8b", device="cuda:0", dtype="bfloat16", max_batched_tokens=8192, max_model_len=8192
    )
    estimated = PoolSizer(MODEL, GPU, memory).resolve(asked)
    demand = Demand(15 * GIB, GIB // 4, GIB // 4)
    measured = PoolSizer(MODEL, GPU, memory, Measured(estimated, demand)).resolve(asked)
    assert measured.num_blocks == int(0.96 * (70 * GIB - 15 * GIB - GIB // 2)) // BLOCK_BYTES["bfloat16"]
    assert estimated.num_blocks is not None
    assert measured.num_blocks > estimated.num_blocks, "the estimate is an upper one"


def test_other_settings_are_not_judged_by_less_than_was_measured() -> None:
    """A measured workspace above the estimate is added to the estimates of other settings: advice stays true."""
    asked = config_of(**BUSY, num_blocks=4096)
    resolved = resolve(asked, 1 << 50)
    estimate = estimate_demand(resolved, MODEL, torch.bfloat16, CPU)
    measured = Measured(resolved, replace(estimate, workspace_bytes=estimate.workspace_bytes + GIB))
    free = needs(asked) + GIB // 2
    sizer = PoolSizer(MODEL, CPU, DeviceMemory(2 * free, free), measured)
    with pytest.raises(OutOfMemoryError):
        sizer.resolve(resolved)
    remedies = sizer.remedies(resolved)
    assert {"num_blocks", "max_num_seqs", "max_batched_tokens"} <= {remedy.setting for remedy in remedies}
    more = PoolSizer(MODEL, CPU, DeviceMemory(2 * free, free - GIB))  # the excess, taken off what is free
    for remedy in remedies:
        more.resolve(replace(resolved, kv_memory_bytes=None, **{remedy.setting: remedy.value}))


def test_a_context_that_nobody_asked_for_follows_the_pool() -> None:
    sizer = PoolSizer(MODEL, CPU, DeviceMemory(64 * GIB, 40 * GIB))
    config = config_of(num_blocks=100, max_batched_tokens=512)
    assert sizer.resolve(config, may_clip=True).max_model_len == 1600
    with pytest.raises(OutOfMemoryError, match="needs 512 KV blocks"):
        sizer.resolve(config)
