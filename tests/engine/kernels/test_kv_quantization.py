"""What storing keys and values in fp8 or int8 costs in accuracy, against float64 on the same unrounded values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.attention.random_step import PagedStep, paged_step
from engine.attention.reference import ReferenceAttention
from engine.kernels.kv_quantization import (
    NEGLIGIBLE,
    dequantized,
    quantized_fp8,
    quantized_int8,
    scale_of_tokens,
)

ROWS = [(1, 1), (90, 1), (700, 1), (40, 40), (300, 20)]
FP8, INT8 = torch.float8_e4m3fn, torch.int8


def _values() -> Tensor:
    torch.manual_seed(0)
    x = torch.randn(200, 3, 64) * 10 ** torch.randn(200, 3, 1)
    x[:, :, ::16] *= 30.0
    x[7, 1] = 0.0
    x[8, 2] = NEGLIGIBLE / 2
    return x


def test_int8_is_off_by_half_a_step_of_its_token_and_head_at_most() -> None:
    x = _values()
    stored, scale = quantized_int8(x)
    torch.testing.assert_close(scale, x.abs().amax(-1) / 127, rtol=0, atol=0)
    error = (stored.double() * scale[..., None].double() - x.double()).abs()
    assert (error <= (0.5 + 1e-4) * scale[..., None] + NEGLIGIBLE).all()
    assert stored.abs().max() == 127


def test_fp8_is_off_by_a_sixteenth_or_by_half_its_smallest_step_and_saturates() -> None:
    x, scale = _values(), torch.tensor([1.0, 0.5, 3.0])
    stored = quantized_fp8(x, scale).double() * scale[:, None].double()
    limit = 448 * scale[:, None].double()
    inside = x.abs() <= limit
    error = (stored - x.double()).abs()
    # A quotient rounded to float32 may be taken for the other side of a middle: 1e-6.
    bound = torch.maximum(x.abs() * (2**-4 + 1e-6), (2**-10 + 1e-9) * scale[:, None])
    assert (error <= bound)[inside].all()
    assert not inside.all()
    assert torch.equal(stored[~inside], (limit * x.sign())[~inside])


def _attend(step: PagedStep, *, deterministic: bool = False) -> Tensor:
    return ReferenceAttention(deterministic=deterministic).forward(
        step.q, step.k_cache, step.v_cache, step.meta, scale=step.scale, k_scale=step.k_scale, v_scale=step.v_scale
    )  # fmt: skip


def _steps(cache_dtype: torch.dtype, outliers: float) -> tuple[PagedStep, PagedStep]:
    """The same tokens in float32 and quantized."""
    plain, quantized = (
        paged_step(ROWS, num_kv_heads=2, group=2, head_size=64, cache_dtype=c, outliers=outliers, seed=3)
        for c in (None, cache_dtype)
    )
    return plain, quantized


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("cache_dtype", [FP8, INT8], ids=["fp8", "int8"])
def test_the_reference_reads_what_the_cache_means(cache_dtype: torch.dtype, deterministic: bool) -> None:
    _, step = _steps(cache_dtype, outliers=10.0)
    # float32 sums of up to 700 terms of magnitude 10, as in the tests of the plain cache
    torch.testing.assert_close(
        _attend(step, deterministic=deterministic).double(), step.exact().reference(), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("cache_dtype", [FP8, INT8], ids=["fp8", "int8"])
def test_attention_is_off_by_no_more_than_stored_values_are(cache_dtype: torch.dtype) -> None:
    """Scores move by at most d, so weights by a factor of exp(2 d) at most, and values by their own error.

    |error| ≤ (exp(2 d) - 1) · Σ weight |v| + exp(2 d) · Σ weight · |error of v|, with the errors that the formats state.
    """
    plain, step = _steps(cache_dtype, outliers=4.0)
    want, got = plain.exact().reference(), step.exact().reference()
    k_error, v_error = (
        _stated_error(values, cache, scale)
        for values, cache, scale in (
            (plain.k_cache, step.k_cache, step.k_scale), (plain.v_cache, step.v_cache, step.v_scale),
        )
    )  # fmt: skip
    starts = plain.meta.query_start.tolist()
    for row, length in enumerate(plain.meta.seq_lens.tolist()):
        blocks = plain.meta.block_tables[row, : -(-length // 16)].long()
        moved = (
            k_error[blocks].transpose(1, 2).flatten(0, 1)[:length].repeat_interleave(2, dim=1)
        )  # [keys, H, D]
        q = plain.q[starts[row] : starts[row + 1]].double().abs()
        d = plain.scale * torch.einsum("thd,shd->ths", q, moved).amax(-1)[..., None]
        part = plain.part(row, 0, len(q)).exact()
        by_weights = PagedStep(part.q, part.k_cache, part.v_cache.double().abs(), part.meta).reference()
        by_values = PagedStep(part.q, part.k_cache, v_error, part.meta).reference()
        bound = torch.expm1(2 * d) * by_weights + torch.exp(2 * d) * by_values
        error = (got - want)[starts[row] : starts[row + 1]].abs()
        assert (error <= bound).all(), row
        assert error.max() > 0


def _stated_error(values: Tensor, cache: Tensor, scale: Tensor | None) -> Tensor:
    """The error that the format allows each stored value [num_blocks, K, block_size, D]."""
    assert scale is not None
    step = scale_of_tokens(cache, scale)[..., None].double()
    if cache.dtype == INT8:
        return (0.5 + 1e-4) * step.expand(cache.shape)
    return torch.maximum(values.double().abs() * (2**-4 + 1e-6), (2**-10 + 1e-9) * step)


# Measured on these tokens: fp8 0.034 and 0.055, int8 0.0074 and 0.027 of the result's root mean square.
@pytest.mark.parametrize(
    ("cache_dtype", "outliers", "share"),
    [(FP8, 1.0, 0.05), (FP8, 10.0, 0.08), (INT8, 1.0, 0.011), (INT8, 10.0, 0.04)],
)
def test_the_usual_error_is_a_small_share_of_the_result(
    cache_dtype: torch.dtype, outliers: float, share: float
) -> None:
    plain, step = _steps(cache_dtype, outliers)
    want, got = plain.exact().reference(), step.exact().reference()
    error = float((got - want).square().mean().sqrt() / want.square().mean().sqrt())
    assert share / 2 < error < share


def test_a_cache_and_its_scales_are_told_apart_by_token_and_by_head() -> None:
    for cache_dtype in (FP8, INT8):
        plain, step = _steps(cache_dtype, 1.0)
        assert step.k_scale is not None
        assert step.k_scale.ndim == (3 if cache_dtype == INT8 else 1)
        written = ~plain.k_cache.isnan()
        values = dequantized(step.k_cache, step.k_scale, torch.float32)
        torch.testing.assert_close(values[written], plain.k_cache[written], rtol=2**-4 + 1e-6, atol=0.05)
