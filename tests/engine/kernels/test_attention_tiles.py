"""The numbers that launches are made of: how many partials a step writes, how many programs share a row."""

from __future__ import annotations

import numpy as np
import pytest

from engine.kernels.attention_tiles import (
    CAPTURED_PROGRAMS,
    SPLIT_TOKENS,
    captured_split_programs,
    max_splits,
    num_partials,
)


def test_partials_are_the_splits_that_the_rows_touch() -> None:
    lengths = [1, SPLIT_TOKENS - 1, SPLIT_TOKENS, SPLIT_TOKENS + 1, 10 * SPLIT_TOKENS, 10 * SPLIT_TOKENS + 1]
    assert [num_partials(np.array([n], dtype=np.int32)) for n in lengths] == [1, 1, 1, 2, 10, 11]
    assert num_partials(np.array(lengths, dtype=np.int32)) == 26
    # 4,096 rows of the longest context that int32 can name
    assert num_partials(np.full(4096, 2**31 - 1, dtype=np.int32)) == 4096 * 2**31 // SPLIT_TOKENS


@pytest.mark.parametrize("window", [None, 1, 100, SPLIT_TOKENS, 4096])
def test_a_row_never_touches_more_splits_than_its_launch_expects(window: int | None) -> None:
    for length in [*range(1, 3 * SPLIT_TOKENS, 7), 40 * SPLIT_TOKENS, 40 * SPLIT_TOKENS + 1]:
        first = max(0, length - window) if window else 0
        touched = (length - 1) // SPLIT_TOKENS - first // SPLIT_TOKENS + 1
        assert touched <= max_splits(length, window), (length, window)
        assert touched <= num_partials(np.array([length], dtype=np.int32)), (length, window)


def test_a_captured_launch_fills_the_device_and_has_no_program_too_many() -> None:
    for rows in (1, 2, 7, 64, 256, 1000):
        for kv_heads in (1, 4, 8):
            for splits in (2, 5, 256):
                programs = captured_split_programs(rows, kv_heads, splits)
                assert 1 <= programs <= splits
                assert rows * kv_heads * programs >= min(CAPTURED_PROGRAMS, rows * kv_heads * splits)
