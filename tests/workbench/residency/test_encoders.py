"""Encoders beside chat models in one host: by name and version, within one memory budget, loaded and unloaded while others answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.config import EngineConfig
from engine.embedding import embed, rerank
from engine.errors import ConfigError, OutOfMemoryError, UnsupportedModelError
from engine.records import MemoryLedger
from engine.sampling_params import SamplingParams
from tests.engine.encoder.conftest import make_encoder
from workbench.host import EngineHost
from workbench.memory_budget import fit_beside
from workbench.resident_format import format_of, told

TEXTS = ["w1 w2 w3", "w7 w8"]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Versions 1 and 2 of an embedder, and a reranker as version 3."""
    root = tmp_path_factory.mktemp("encoders")
    make_encoder("bert", root / "1")
    make_encoder("roberta", root / "2")
    make_encoder("bert", root / "3", "ForSequenceClassification", num_labels=1)
    return {version: root / str(version) for version in (1, 2, 3)}


def test_what_is_set_for_models_that_generate_is_not_asked_of_encoders(encoders: dict[int, Path]) -> None:
    config = EngineConfig(model=str(encoders[1]), tensor_parallel_size=2, num_blocks=64)
    assert fit_beside(config, {}).tensor_parallel_size == 1


def vectors(host: EngineHost, model: str) -> list[Any]:
    return [each.vector for each in embed(host.worker(model), TEXTS)]


@pytest.mark.full
def test_encoders_come_move_and_go_beside_a_chat_model(
    hosted: Callable[..., Any], encoders: dict[int, Path], versions: Any, eventually: Callable[..., bool]
) -> None:
    versions.folders = encoders
    with hosted(budget=fit_beside, deterministic=False) as host:
        stream = host.worker().submit([1, 2, 3], SamplingParams(max_tokens=400, ignore_eos=True))
        host.follow("t@champion")
        host.serve("t@champion", 1)
        first = vectors(host, "t@champion")
        assert [each.task for each in host.resident()] == ["generate", "embed"]
        for name in ("t/1", "models:/t@champion", "models:/t/1"):
            np.testing.assert_array_equal(vectors(host, name), first)
        host.serve("t@champion", 2)
        assert not np.allclose(vectors(host, "t@champion"), first)
        assert eventually(lambda: not host.draining())
        reranker = host.load("t/3")
        assert rerank(host.worker("t/3"), "w1", TEXTS)
        ledger = host.worker("t/3").stats().memory
        assert ledger is not None
        assert reranker.memory_bytes == ledger.engine_bytes
        assert ledger.kv_bytes == 0
        assert (
            ledger.weights_bytes >= (encoders[3] / "model.safetensors").stat().st_size // 2 - 4096
        )  # float64 there
        assert "KV cache" not in told(format_of(reranker))
        with pytest.raises(ConfigError, match="does not sleep"):
            host.sleep("t/3")
        assert host.find("t/3").state.ready, "a refused sleep leaves it serving"
        assert rerank(host.worker("t/3"), "w1", TEXTS)
        host.unload("t/3")
        assert eventually(lambda: [each.id for each in host.resident()] == ["tiny-llama", "t/2"])
        assert len(stream.result(120).token_ids) == 400


@pytest.mark.full
def test_encoder_that_does_not_fit_or_cannot_be_read_leaves_the_others_serving(
    hosted: Callable[..., Any], encoders: dict[int, Path], tmp_path: Path
) -> None:
    def stingy(given: Any, others: Any) -> Any:
        return fit_beside(given, {name: MemoryLedger(1 << 50, 0, 0, 0, "cpu") for name in others})

    with hosted(budget=stingy) as host:
        with pytest.raises(OutOfMemoryError, match="does not fit beside what is resident") as refused:
            host.load(str(encoders[1]))
        assert refused.value.limit == 0
        assert refused.value.value > 0
        make_encoder("bert", tmp_path / "pickled")
        (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
        with pytest.raises(UnsupportedModelError, match="only pickled weights"):
            host.load(str(tmp_path / "pickled"))
        assert [each.id for each in host.resident()] == ["tiny-llama"]
        assert host.worker().submit([3, 4], SamplingParams(max_tokens=2)).result(60).num_output_tokens == 2
