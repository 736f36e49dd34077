"""Blocks that return from host memory are as good as those that never left, on the real model.

The working set is three prompts, the pool holds little more than one. Each case asserts that blocks did go and come back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from engine.build import build_engine
from engine.config import EngineConfig
from engine.kernels.cpu_library import unavailable_reason
from engine.sampling_params import SamplingParams

SIZE = 8  # tokens a block
SWAP = 1 << 22  # bytes: more than all blocks of a case take
PARAMS = SamplingParams(max_tokens=8, temperature=0.9, top_k=30, seed=11, ignore_eos=True, logprobs=2)
TIGHT: dict[str, Any] = {"num_blocks": 14, "max_model_len": 112}
# The compiled kernels, where there is a compiler, are faster; what is copied is the same.
EXACT: dict[str, Any] = {
    "dtype": "float32", "deterministic": True, "block_size": SIZE, "num_threads": 1,
    "attention_backend": "cpu" if unavailable_reason() is None else "reference",
}  # fmt: skip
Prompts = Callable[..., list[int]]


@pytest.fixture(scope="module")
def folder(tiny_models: Callable[[str], Any]) -> Any:
    return tiny_models("wide_llama").folder


def test_tokens_and_bits_are_those_without_the_tier_and_those_of_a_large_pool(
    folder: Any, prompt_of: Prompts, run_engine: Callable[..., Any]
) -> None:
    """Three prompts one after the other, then the same in another order; the last one shares a beginning only."""
    first = {name: prompt_of(66 + 5 * i, i) for i, name in enumerate("abc")}
    again = {f"{name} again": first[name] for name in "bca"} | {"other": first["a"][:40] + prompt_of(9)}
    prompts = first | again
    arrive_at = {name: 12 * i for i, name in enumerate(prompts)}
    tier, without, roomy = (
        run_engine(folder, prompts, PARAMS, arrive_at=arrive_at, **EXACT, **settings)
        for settings in ({**TIGHT, "swap_space_bytes": SWAP}, TIGHT, {"max_model_len": 112})
    )
    # All full blocks of a prompt return, but for the last token's; "other" shares five.
    expected = {f"{name} again": (len(first[name]) - 1) // SIZE * SIZE for name in "bca"} | {"other": 40}
    assert tier.prefix_hits == roomy.prefix_hits == expected
    missed = sum(expected.values()) - sum(without.prefix_hits.values())
    assert missed > 0
    assert sum(record.num_blocks_back for record in tier.records) == missed // SIZE
    assert not any(r.num_blocks_out or r.num_blocks_back for run in (without, roomy) for r in run.records)
    for name in prompts:
        assert tier.tokens[name] == without.tokens[name] == roomy.tokens[name], name
        assert tier.logprobs[name] == without.logprobs[name] == roomy.logprobs[name], f"{name}: other bits"


@pytest.mark.parametrize("stored", ["auto", "int8"])  # int8's scales go along
def test_a_preempted_sequence_finds_its_blocks_in_the_tier(
    folder: Any, prompt_of: Prompts, run_engine: Callable[..., Any], stored: str
) -> None:
    prompts = {"a": prompt_of(70, 5), "b": prompt_of(62, 6), "x": prompt_of(66, 3)}
    params, settings = PARAMS.with_(max_tokens=30), {**EXACT, "kv_cache_dtype": stored}
    run = run_engine(
        folder, prompts, params, **settings, num_blocks=29, max_model_len=112, swap_space_bytes=SWAP
    )
    assert "x" in run.preempted
    assert any(record.num_blocks_back and "x" in dict(record.prefix_hits) for record in run.records)
    alone = run_engine(folder, {"x": prompts["x"]}, params, **settings)
    assert run.logprobs["x"] == alone.logprobs["x"]


def test_the_figures_say_what_is_where(folder: Any, prompt_of: Prompts) -> None:
    base: dict[str, Any] = {
        "model": str(folder),
        "dtype": "float32",
        "block_size": SIZE,
        "num_threads": 1,
        **TIGHT,
    }
    plain = build_engine(EngineConfig(**base))
    engine = build_engine(EngineConfig(**base, swap_space_bytes=SWAP))
    cached = {}
    for i, seed in enumerate((1, 2, 1)):
        engine.add(engine.make_request(prompt_of(90, seed), PARAMS, request_id=str(i)))
        while engine.has_work:
            cached |= {record.request_id: record.num_cached_tokens for record in engine.step().requests}
    assert cached == {"0": 0, "1": 0, "2": 88}
    stats, memory, without = engine.stats(), engine.stats().memory, plain.stats().memory
    assert memory is not None
    assert without is not None
    block_bytes = memory.kv_bytes // stats.num_blocks
    assert stats.num_host_blocks == SWAP // block_bytes
    assert memory.host_tier_bytes == stats.num_host_blocks * block_bytes
    staging = SWAP  # all of it: it is below the limit
    assert memory.engine_bytes == without.engine_bytes + memory.host_tier_bytes + staging
    assert stats.cached_prompt_tokens == 88
    assert 0 < stats.blocks_back <= 88 // SIZE
    assert stats.num_cached_host_blocks == stats.blocks_out, "a block that came back has kept its place"
    assert (plain.stats().num_host_blocks, without.host_tier_bytes) == (0, 0)
    engine.close()
    plain.close()
