"""store_kv against its reference."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.store_kv import store_kv, store_kv_ref


def _caches(heads: int, size: int, block_size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.full((9, heads, block_size, size), 7.0, dtype=dtype) for _ in range(2))  # type: ignore[return-value]


# 3 heads of 80 leave lanes of the padded width idle; 1 head of 64 fills one program exactly; 2 × 128 is the common case.
@pytest.mark.parametrize(("heads", "size"), [(1, 64), (3, 80), (2, 128)])
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_token_lands_in_its_slot_and_nothing_else_changes(
    heads: int, size: int, block_size: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    tokens = 37
    merged = torch.randn(tokens, heads + 2, size).to(dtype)  # k is a view into a wider projection
    k, v = merged[:, 2:], torch.randn(tokens, heads, size).to(dtype)
    slots = torch.randperm(9 * block_size)[:tokens]
    slots[[3, 20]] = -1  # padding
    got, want = _caches(heads, size, block_size, dtype), _caches(heads, size, block_size, dtype)
    store_kv(k, v, *got, slots)
    store_kv_ref(k, v, *want, slots)
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours, theirs)
        assert (ours != 7).any()


def test_values_are_rounded_to_the_dtype_of_the_cache() -> None:
    k, v = torch.randn(5, 2, 64), torch.randn(5, 2, 64)
    got, want = _caches(2, 64, 16, torch.float16), _caches(2, 64, 16, torch.float16)
    slots = torch.tensor([0, 17, 40, 143, 2])
    store_kv(k, v, *got, slots)
    store_kv_ref(k, v, *want, slots)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_no_tokens_is_no_work() -> None:
    caches = _caches(2, 64, 16, torch.float32)
    store_kv(torch.empty(0, 2, 64), torch.empty(0, 2, 64), *caches, torch.empty(0, dtype=torch.int64))
    assert (caches[0] == 7).all()
    assert (caches[1] == 7).all()


def test_heads_that_do_not_lie_side_by_side_are_refused() -> None:
    caches = _caches(2, 64, 16, torch.float32)
    k = torch.randn(2, 5, 64).transpose(0, 1)
    with pytest.raises(AssertionError, match="side by side"):
        store_kv(k, k, *caches, torch.arange(5))
