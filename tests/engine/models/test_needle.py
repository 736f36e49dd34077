"""The needle test finds what it is for, and only that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from engine.build import build_engine
from engine.config import EngineConfig
from engine.kernels.cpu_library import unavailable_reason
from engine.models.layers import Linear
from engine.needle import find_needle

VOCAB = 97


@pytest.fixture(scope="module")
def make_engine(tiny_models: Callable[[str], Any]) -> Callable[..., Any]:
    def make(**settings: Any) -> Any:
        values = {
            "dtype": "float32",
            "block_size": 8,
            "num_blocks": 80,
            "num_threads": 1,
            "max_batched_tokens": 96,
        }
        return build_engine(
            EngineConfig(model=str(tiny_models("wide_llama").folder), **{**values, **settings})
        )

    return make


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_deterministic_mode_holds(make_engine: Callable[..., Any], backend: str) -> None:
    if backend == "cpu" and unavailable_reason() is not None:
        pytest.skip(f"no compiled CPU kernel: {unavailable_reason()}")
    engine = make_engine(deterministic=True, attention_backend=backend)
    proof = find_needle(engine, VOCAB)
    assert proof.holds, proof.difference
    engine.check_integrity()
    assert not engine.has_work
    engine.close()


def test_a_context_shorter_than_a_share_of_the_step_is_proven_too(make_engine: Callable[..., Any]) -> None:
    engine = make_engine(deterministic=True, attention_backend="reference", max_model_len=20)
    assert engine.stats().is_proven_deterministic


def test_others_in_the_batch_that_change_a_bit_are_found(
    make_engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = Linear.forward

    def forward(self: Linear, x: torch.Tensor) -> torch.Tensor:
        return exact(self, x) * (
            1 + 1e-6 * x.shape[0]
        )  # as a library does that chooses its kernel by the shape

    monkeypatch.setattr(Linear, "forward", forward)
    proof = find_needle(make_engine(deterministic=False, attention_backend="reference"), VOCAB)
    assert not proof.holds
    assert proof.difference is not None
    assert "beside other requests" in proof.difference


def test_a_cache_that_changes_a_bit_is_found(
    make_engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(deterministic=True, attention_backend="reference")
    cache = engine._runner._caches[0].v
    prompts = []
    admit = engine._runner._batch._admit

    def spoil(admission: Any) -> None:
        prompts.append(admission.num_computed)
        if admission.num_computed:  # a prefix hit
            cache.mul_(1 + 1e-6)
        admit(admission)

    monkeypatch.setattr(engine._runner._batch, "_admit", spoil)
    proof = find_needle(engine, VOCAB)
    assert max(prompts) > 0
    assert proof.difference is not None
    assert "from the prefix cache" in proof.difference


def test_the_needles_prompt_is_cut_beside_others(make_engine: Callable[..., Any]) -> None:
    engine, chunks = make_engine(deterministic=True, attention_backend="reference"), []
    step = engine.step

    def watched() -> Any:
        output = step()
        if output.record is not None:
            chunks.extend(
                (n, len(output.record.rows)) for name, n in output.record.rows if name == "needle" and n > 1
            )
        return output

    engine.step = watched
    assert find_needle(engine, VOCAB).holds
    alone = [n for n, rows in chunks if rows == 1]
    beside = [n for n, rows in chunks if rows > 1]
    assert beside
    assert set(beside) - set(alone), (alone, beside)
