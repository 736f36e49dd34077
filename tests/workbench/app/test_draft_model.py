"""A draft model in the app's settings: what it takes is in the plan, and what does not fit is said before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.records import MemoryLedger
from workbench.doctor import Finding, examine
from workbench.memory_budget import fit_beside

BUNDLED = Path(__file__).parents[3] / "data" / "models" / "chat-base"


def guessing(draft: Path) -> dict[str, Any]:
    return {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 3}


def looked_at(monkeypatch: pytest.MonkeyPatch, home: Path, draft: Path) -> Finding:
    monkeypatch.setenv("QUIRE_SPECULATIVE_CONFIG", json.dumps(guessing(draft)))
    return next(f for f in examine(home_dir=home, model=str(BUNDLED)) if f.name == "draft model")


def test_doctor_says_what_a_draft_model_takes_or_why_it_does_not_go_with_the_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = looked_at(monkeypatch, tmp_path, BUNDLED)
    assert found.level == "ok"
    assert "weights" in found.message
    assert "a token beside the model's" in found.message
    other = tmp_path / "other"
    other.mkdir()
    values = json.loads((BUNDLED / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**values, "vocab_size": values["vocab_size"] + 8}))
    refused = looked_at(monkeypatch, tmp_path, other)
    assert refused.level == "error"
    assert "another vocabulary" in refused.message
    assert refused.remedy


def test_an_engine_beside_others_has_fewer_blocks_with_a_draft_model() -> None:
    others = {"one": MemoryLedger(1 << 20, 1 << 20, 1 << 20, 1 << 40, "cpu")}

    def num_blocks(speculative: dict[str, Any] | None) -> int:
        config = EngineConfig(
            model=str(BUNDLED), device="cpu", dtype="float32", kv_cache_dtype="float32", speculative_config=speculative
        )  # fmt: skip
        return fit_beside(config, others).num_blocks or 0

    assert (
        num_blocks(guessing(BUNDLED)) == num_blocks(None) // 2
    )  # each block has the keys and values of both
