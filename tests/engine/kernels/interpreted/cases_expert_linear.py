"""The products of a mixture's experts against the reference, and a row's bits whatever rows are beside it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.kernels.expert_linear import expert_linear, expert_linear_ref
from engine.models.experts import SparseMlp
from engine.models.moe_config import MoeConfig

DTYPES = [torch.float32, torch.bfloat16]
# Rows of each expert: none, less than a tile, a whole one, more; a number of experts that is no power of two.
COUNTS = [(3, 0, 16, 1, 33), (1,)]


def operands(
    counts: tuple[int, ...], dtype: torch.dtype, *, size_in: int = 40, size_out: int = 40
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(counts))
    rows = sum(counts)
    x = torch.randn(rows, 2 * size_in, generator=generator).to(dtype)[:, :size_in]  # further apart than wide
    weight = torch.randn(len(counts), size_out, size_in, generator=generator).to(dtype)
    starts = torch.tensor((0, *counts)).cumsum(0)
    return [x, weight, starts, torch.randperm(rows, generator=generator)]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_row_meets_its_own_expert(counts: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, starts, rows = operands(counts, dtype)
    for chosen in (None, rows):
        want = expert_linear_ref(x.double(), weight.double(), starts, chosen)
        # Sums of 40 products in float32, each within half a unit; the result is rounded once.
        slack = 40 * torch.finfo(torch.float32).eps * float(want.abs().max())
        got = expert_linear(x, weight, starts, chosen).double()
        torch.testing.assert_close(got, want, rtol=0.51 * torch.finfo(dtype).eps, atol=slack)


def test_a_row_keeps_its_bits_beside_other_rows() -> None:
    x, weight, starts, _ = operands((3, 0, 16, 1, 33), torch.bfloat16)
    together = expert_linear(x, weight, starts)
    for row, expert in ((0, 0), (18, 2), (19, 3), (52, 4)):
        alone = (torch.arange(6) > expert).long()  # one row of this expert
        assert torch.equal(expert_linear(x[row : row + 1], weight, alone)[0], together[row]), row


def test_one_row_may_go_to_several_experts() -> None:
    x, weight, _, _ = operands((2, 2), torch.float32)
    rows, starts = torch.tensor([0, 1, 1, 0, 3]), torch.tensor([0, 3, 5])
    want = expert_linear_ref(x, weight, starts, rows)
    torch.testing.assert_close(expert_linear(x, weight, starts, rows), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shared_size", [0, 24])
def test_a_layer_computes_what_it_does_without_kernels(shared_size: int) -> None:
    moe = MoeConfig(
        num_experts=5, experts_per_token=3, intermediate_size=24, is_normalized=True, rounds_weights=False,
        shared_size=shared_size, layers=(True,),
    )  # fmt: skip
    torch.manual_seed(0)
    mlp = SparseMlp(moe, 40, dtype=torch.float32, device=torch.device("cpu"))
    for parameter in mlp.parameters():
        parameter.normal_(0.0, 0.3)
    x = torch.randn(7, 40)
    want = mlp(x)
    mlp.use_kernel = True
    torch.testing.assert_close(mlp(x), want, rtol=1e-5, atol=1e-5)


def test_no_rows_is_no_work() -> None:
    starts = torch.zeros(3, dtype=torch.int64)
    assert expert_linear(torch.empty(0, 8), torch.ones(2, 4, 8), starts).shape == (0, 4)
