"""Every native architecture says what transformers says, in float64 to the rounding of its sums."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.models.native_configs import NATIVE
from tests.engine.models.parity import check_parity


@pytest.mark.parametrize("name", NATIVE)
def test_an_engine_says_what_transformers_says(name: str, tmp_path: Path) -> None:
    case = NATIVE[name]
    check_parity(case.config(), tmp_path, lengths=case.lengths, **case.settings)
