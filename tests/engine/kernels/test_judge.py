"""The judge of attention results: exact where no error is allowed, and never satisfied by not-a-number."""

from __future__ import annotations

import torch

from engine.attention.random_step import excess_error, paged_step


def test_a_result_of_exactly_zero_is_right_and_not_a_number_is_wrong() -> None:
    step = paged_step([(8, 1)], num_kv_heads=1, group=1, head_size=16)
    step.v_cache.nan_to_num_().mul_(0.0)
    right = step.reference()
    assert torch.count_nonzero(right) == 0
    assert excess_error(right, step) == 0.0
    assert excess_error(right + 1e-30, step) > 1.0
    assert not excess_error(torch.full_like(right, float("nan")), step) <= 1.0
