"""Measuring a CPU: what is told of it, and that it ends when it is told to."""

from __future__ import annotations

import pytest
import torch

from engine.device_limits import Interrupted, measure_limits

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rates_are_those_of_a_processor(dtype: torch.dtype) -> None:
    found = measure_limits(CPU, dtype, 5 << 20, budget_s=0.1)
    assert (found.device, found.dtype) == ("cpu", str(dtype).removeprefix("torch."))
    assert found.working_set_bytes == 8 << 20
    # Far below and above any: a rate in another unit, or of one call taken for many, falls outside.
    assert 1e8 < found.bytes_s < 1e13
    assert 1e8 < found.flops_s < 1e15


def test_it_ends_at_once_when_it_is_told_to() -> None:
    asked = []

    def stop_at_the_third() -> bool:
        asked.append(True)
        return len(asked) == 3

    with pytest.raises(Interrupted):
        measure_limits(CPU, torch.float32, budget_s=60.0, should_stop=stop_at_the_third)
    assert len(asked) == 3
