"""Architectures without a native decoder say through their own code and our cache what transformers says without it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.models.parity import _InFloat64, compare, exact_logits, make_model
from tests.engine.models.transformers_configs import THROUGH_TRANSFORMERS


@pytest.mark.parametrize("name", THROUGH_TRANSFORMERS)
def test_an_engine_says_what_transformers_says(name: str, tmp_path: Path) -> None:
    model = make_model(THROUGH_TRANSFORMERS[name]())
    model.save_pretrained(tmp_path)
    with _InFloat64():
        found = compare(tmp_path, lambda tokens: exact_logits(model, tokens), lengths=(37, 96))
    assert found.holds, found
