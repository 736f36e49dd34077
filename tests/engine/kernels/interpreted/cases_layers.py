"""The kernels of norms and rotary embedding against the layers that they stand for."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.rms_norm import rms_norm
from engine.kernels.rotary import rotate_in_place
from engine.models.layers import RMSNorm, rotate

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


# Rows of a hidden state and heads of a projection (a view, as q and k are); sizes that fill a power of two and do not.
@pytest.mark.parametrize("shape", [(5, 256), (3, 4, 64), (3, 2, 80), (1, 300)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(shape[-1], 1e-5, dtype=dtype, device=torch.device("cpu"))
    norm.weight.normal_(1.0, 0.3)
    x = torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)[..., : shape[-1]]
    got = rms_norm(x, norm.weight, norm.eps)
    assert got.is_contiguous()
    assert got.shape == x.shape
    # Two roundings, either of which may fall to the other side of a tie.
    torch.testing.assert_close(got, norm(x), rtol=2.1 * torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(rms_norm(x[:1], norm.weight, norm.eps), got[:1])


@pytest.mark.parametrize(("heads", "size"), [(4, 64), (3, 80), (1, 22)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_in_place(heads: int, size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    merged = torch.randn(5, heads + 2, size).to(dtype)
    before = merged.clone()
    table = torch.randn(5, size)
    want = rotate(merged[:, :heads], table)
    rotate_in_place(merged[:, :heads], table)
    torch.testing.assert_close(merged[:, :heads], want, rtol=1.1 * torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(merged[:, heads:], before[:, heads:]), "heads beside the view were touched"


def test_no_tokens_is_no_work() -> None:
    assert rms_norm(torch.empty(0, 64), torch.ones(64), 1e-5).shape == (0, 64)
    rotate_in_place(torch.empty(0, 2, 64), torch.empty(0, 64))
