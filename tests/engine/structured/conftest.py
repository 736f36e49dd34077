"""Engines whose outputs follow grammars: on a FakeRunner, and the bundled model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.engine import Engine
from engine.fake_runner import FakeRunner, FakeTokenizer
from engine.plan import KVSpec
from engine.worker import EngineWorker

BUNDLED = Path(__file__).parents[3] / "data" / "models" / "chat-base"


@pytest.fixture
def make_worker() -> Iterator[Callable[..., EngineWorker]]:
    """Started workers on a FakeRunner; keyword arguments are EngineConfig's, `runner` holds FakeRunner's."""
    workers: list[EngineWorker] = []

    def make(*, runner: dict[str, Any] | None = None, tokenizer: Any = ..., **config: Any) -> EngineWorker:
        found = FakeTokenizer() if tokenizer is ... else tokenizer
        settings = {
            "num_blocks": 256,
            "block_size": 16,
            "max_batched_tokens": 512,
            "max_num_seqs": 16,
            "max_model_len": 512,
        }
        settings |= config
        fake = FakeRunner(
            settings["num_blocks"], settings["block_size"], **{"vocab_size": FakeTokenizer().vocab_size} | (runner or {})
        )  # fmt: skip
        engine = Engine(
            EngineConfig(model="fake", **settings), fake,
            kv_spec=KVSpec(1, 1, 16, settings["block_size"], 4), eos_token_ids=frozenset({FakeTokenizer.EOS}),
            vocab_size=fake.vocab_size, tokenizer=found,
        )  # fmt: skip
        workers.append(EngineWorker(engine))
        workers[-1].start()
        return workers[-1]

    yield make
    for worker in workers:
        worker.close()


@pytest.fixture(scope="session")
def bundled() -> Path:
    """The bundled model's folder."""
    if not (BUNDLED / "model.safetensors").is_file():
        pytest.skip("data/models/chat-base has no weights")
    return BUNDLED
