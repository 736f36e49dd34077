"""The Engine page names where guessed tokens come from."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.config import EngineConfig
from engine.engine import Engine
from engine.fake_runner import FakeRunner, FakeTokenizer
from engine.plan import KVSpec
from workbench.ui.components.engine_live import _tiles


@pytest.mark.parametrize(
    ("speculative", "source"),
    [
        ({"method": "draft_model", "model": "small"}, "a draft model"),
        ({"method": "ngram"}, "n-grams"),
    ],
)
def test_a_tile_says_how_many_guesses_of_which_source_were_right(
    speculative: dict[str, str], source: str
) -> None:
    config = EngineConfig(
        model="fake", num_blocks=8, max_batched_tokens=64, max_model_len=64, speculative_config=speculative
    )
    engine = Engine(
        config, FakeRunner(8), kv_spec=KVSpec(1, 1, 8, 16, 4), eos_token_ids=frozenset(), vocab_size=256,
        tokenizer=FakeTokenizer(),
    )  # fmt: skip
    stats = engine.stats()
    assert not any("guessed" in tile.note for tile in _tiles(stats))
    tile = _tiles(replace(stats, draft_tokens=8, accepted_tokens=6))[-1]
    assert tile.note == f"6 of 8 tokens guessed by {source}"
