"""Kernels on the GPU against their references, at real sizes; and the bits that they promise not to change."""

from __future__ import annotations

import gc
import itertools

import pytest
import torch
from torch import Tensor

from engine.attention.random_step import PagedStep, excess_error, paged_step
from engine.attention.triton_paged import TritonPagedAttention
from engine.kernels.attention_tiles import SPLIT_TOKENS
from engine.kernels.rms_norm import rms_norm
from engine.kernels.rotary import rotate_in_place
from engine.kernels.store_kv import store_kv, store_kv_ref
from engine.models.layers import RMSNorm, rotate

DECODE = [(1, 1), (16, 1), (511, 1), (512, 1), (513, 1), (4096, 1), (6000, 1)]
PREFILL = [(2, 2), (300, 300), (2048, 2048), (5000, 700)]


def _run(step: PagedStep, *, deterministic: bool = False, window: int | None = None) -> Tensor:
    backend = TritonPagedAttention(deterministic=deterministic)
    out = torch.full_like(step.q, float("nan"))  # an element that is not written shows
    return backend.forward(
        step.q, step.k_cache, step.v_cache, step.meta, scale=step.scale, sliding_window=window, out=out
    )


# Llama 8B's heads, Qwen2 7B's, a small Llama's, and heads of 80 without groups.
@pytest.mark.parametrize(
    ("kv_heads", "group", "size", "block_size"),
    [(8, 4, 128, 16), (4, 7, 128, 32), (8, 8, 64, 16), (4, 1, 80, 16)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("deterministic", [False, True])
def test_attention_agrees_with_the_definition(
    kv_heads: int,
    group: int,
    size: int,
    block_size: int,
    dtype: torch.dtype,
    deterministic: bool,
    device: torch.device,
) -> None:
    for name, rows in {"decode": DECODE, "prefill": PREFILL, "mixed": [*DECODE[4:], *PREFILL[1:]]}.items():
        step = paged_step(
            rows,
            num_kv_heads=kv_heads,
            group=group,
            head_size=size,
            block_size=block_size,
            dtype=dtype,
            device=device,
        )
        excess = excess_error(_run(step, deterministic=deterministic), step)
        assert excess <= 1.0, f"{name}: the error is {excess:.2f} of what rounding allows"


@pytest.mark.parametrize("window", [1, 100, SPLIT_TOKENS + 3, 4096])
@pytest.mark.parametrize("deterministic", [False, True])
def test_window(window: int, deterministic: bool, device: torch.device) -> None:
    rows = [(8, 1), (5000, 1), (40, 30), (5000, 900)]
    step = paged_step(rows, num_kv_heads=8, group=4, head_size=128, dtype=torch.bfloat16, device=device)
    excess = excess_error(_run(step, window=window, deterministic=deterministic), step, window)
    assert excess <= 1.0, f"the error is {excess:.2f} of what rounding allows"


def test_a_long_context(device: torch.device) -> None:
    rows = [(40000, 1), (100, 1), (33000, 40)]
    step = paged_step(rows, num_kv_heads=2, group=4, head_size=128, dtype=torch.bfloat16, device=device)
    excess = excess_error(_run(step), step)
    assert excess <= 1.0, f"the error is {excess:.2f} of what rounding allows"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_store_kv(dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(0)
    merged = torch.randn(5000, 48, 128, generator=generator, device=device).to(dtype)
    k, v = merged[:, 32:40], merged[:, 40:]
    slots = torch.randperm(400 * 16, generator=generator, device=device)[:5000]
    slots[[7, 4999]] = -1
    got, want = (
        [torch.zeros(400, 8, 16, 128, dtype=dtype, device=device) for _ in range(2)] for _ in range(2)
    )
    store_kv(k, v, got[0], got[1], slots)
    store_kv_ref(k, v, want[0], want[1], slots)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rms_norm(dtype: torch.dtype, device: torch.device) -> None:
    for shape in ((513, 4096), (64, 32, 128), (3, 5120), (17, 4, 80)):
        norm = RMSNorm(shape[-1], 1e-5, dtype=dtype, device=device)
        norm.weight.normal_(1.0, 0.3)
        x = torch.randn(*shape[:-1], 2 * shape[-1], device=device).to(dtype)[..., : shape[-1]]
        got = rms_norm(x, norm.weight, norm.eps)
        torch.testing.assert_close(got, norm(x), rtol=2.1 * torch.finfo(dtype).eps, atol=1e-6)
        assert torch.equal(rms_norm(x[2:3], norm.weight, norm.eps), got[2:3]), (
            "a row depends on its neighbours"
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rotary(dtype: torch.dtype, device: torch.device) -> None:
    for tokens, heads, size in ((700, 32, 128), (5, 7, 80)):
        merged = torch.randn(tokens, heads + 3, size, device=device).to(dtype)
        table = torch.randn(tokens, size, device=device)
        want = rotate(merged[:, :heads], table)
        beside = merged[:, heads:].clone()
        rotate_in_place(merged[:, :heads], table)
        torch.testing.assert_close(merged[:, :heads], want, rtol=1.1 * torch.finfo(dtype).eps, atol=1e-6)
        assert torch.equal(merged[:, heads:], beside)


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_row_decodes_to_the_same_bits_whatever_shares_the_batch(
    deterministic: bool, device: torch.device
) -> None:
    rows = [(300, 1), (6000, 1), (17, 1), *[(100 * i, 1) for i in range(1, 60)], (600, 500)]
    step = paged_step(rows, num_kv_heads=8, group=4, head_size=128, dtype=torch.bfloat16, device=device)
    together = _run(step, deterministic=deterministic)
    for row in (0, 1, 2, 3, 30, 61):
        alone = _run(step.part(row, 0, 1), deterministic=deterministic)
        assert torch.equal(alone, together[row : row + 1]), rows[row]


# Every chunking of the same 700 tokens: as a whole, in pieces that start and end inside tiles and splits, as decode.
@pytest.mark.parametrize("window", [None, 250])
@pytest.mark.parametrize(("size", "group"), [(128, 4), (64, 7)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_deterministic_chunks_and_decode_give_the_same_bits(
    dtype: torch.dtype, size: int, group: int, window: int | None, device: torch.device
) -> None:
    whole = paged_step([(1200, 700)], num_kv_heads=2, group=group, head_size=size, dtype=dtype, device=device)
    want = _run(whole, deterministic=True, window=window)
    cuts = [0, 11, 12, 13, 140, 523, 524, 699, 700]
    for begin, end in itertools.pairwise(cuts):
        got = _run(whole.part(0, begin, end), deterministic=True, window=window)
        assert torch.equal(got, want[begin:end]), (begin, end)


def test_repeated_launches_give_the_same_bits(device: torch.device) -> None:
    """A result that moves between launches would be a race."""
    step = paged_step(
        [*DECODE, *PREFILL], num_kv_heads=8, group=4, head_size=128, dtype=torch.bfloat16, device=device
    )
    first = _run(step)
    for _ in range(10):
        assert torch.equal(_run(step), first)


def test_launching_waits_for_nothing_and_closing_leaves_nothing(device: torch.device) -> None:
    step = paged_step(
        [(6000, 1), (300, 20)], num_kv_heads=8, group=4, head_size=128, dtype=torch.bfloat16, device=device
    )
    want = _run(step)
    torch.cuda.synchronize(device)
    gc.collect()
    before = torch.cuda.memory_allocated(device)
    backend = TritonPagedAttention()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = backend.forward(step.q, step.k_cache, step.v_cache, step.meta, scale=step.scale)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, want)
    assert backend.workspace_bytes > 0
    del got
    backend.close()
    assert torch.cuda.memory_allocated(device) == before
