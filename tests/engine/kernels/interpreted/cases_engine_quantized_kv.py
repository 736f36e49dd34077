"""The whole engine on the Triton kernels with a quantized KV cache, which the fused rotary kernel writes."""

from __future__ import annotations

import pytest

from tests.engine.kernels.interpreted.cases_engine import check_same


@pytest.mark.parametrize("stored", ["int8", "fp8"])
def test_the_engine_generates_the_same_with_a_quantized_cache(stored: str) -> None:
    check_same(stored)
