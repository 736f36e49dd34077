"""The batch-invariant product against float64, and its promise: a row's bits do not depend on the number of rows."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.invariant_linear import invariant_linear

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Whole tiles; not a multiple of a tile in any direction; fewer outputs than one tile.
SHAPES = [(64, 128, 128), (70, 96, 100), (1, 33, 10), (130, 64, 192)]


def operands(rows: int, size_in: int, size_out: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 2 * size_in, generator=generator).to(dtype)[
        :, :size_in
    ]  # rows further apart than wide
    weight = torch.randn(size_out, size_in, generator=generator).to(dtype)
    return x, weight, torch.randn(size_out, generator=generator).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_the_definition(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, weight, bias = operands(*shape, dtype)
    want = x.double() @ weight.double().T
    # Sums of about shape[1] products in float32, each within half a unit; the result is rounded once.
    slack = (
        shape[1] * torch.finfo(torch.float32).eps * (x.double().abs() @ weight.double().abs().T).max().item()
    )
    for given, expected in ((None, want), (bias, want + bias.double())):
        torch.testing.assert_close(
            invariant_linear(x, weight, given).double(),
            expected,
            rtol=0.51 * torch.finfo(dtype).eps,
            atol=slack,
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_keeps_its_bits_alone_in_other_places_and_in_larger_batches(dtype: torch.dtype) -> None:
    x, weight, bias = operands(131, 100, 70, dtype)
    together = invariant_linear(x, weight, bias)
    for row in (0, 63, 64, 130):
        assert torch.equal(invariant_linear(x[row : row + 1], weight, bias)[0], together[row]), row
    assert torch.equal(invariant_linear(x[5:83], weight, bias), together[5:83])


def test_no_rows_is_no_work() -> None:
    assert invariant_linear(torch.empty(0, 8), torch.ones(4, 8)).shape == (0, 4)
