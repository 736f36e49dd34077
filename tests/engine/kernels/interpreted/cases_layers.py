"""The kernels of a decoder layer against the layers of `engine.models.layers`, which they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.kernels.kv_quantization import QUANTIZED_DTYPES, new_scales, store_quantized_kv_ref
from engine.kernels.rms_norm import fused_add_rms_norm, rms_norm
from engine.kernels.rotary import rotate_and_store
from engine.kernels.silu_and_mul import gelu_tanh_and_mul, silu_and_mul
from engine.kernels.store_kv import store_kv_ref
from engine.models.layers import RMSNorm, gated, rotate

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BLOCK = 16
UNWRITTEN = 1000.0  # no rotated value comes near


def _norm(size: int, dtype: torch.dtype, *, offset: bool = False) -> RMSNorm:
    norm = RMSNorm(size, 1e-5, dtype=dtype, device=torch.device("cpu"), offset=offset)
    norm.weight.normal_(0.0 if offset else 1.0, 0.3)
    return norm


# Sizes that fill a power of two and do not; several rows and one; rows that are part of wider ones.
@pytest.mark.parametrize(("rows", "size"), [(5, 256), (3, 80), (1, 300)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(rows: int, size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = _norm(size, dtype)
    x = torch.randn(rows, 2 * size).to(dtype)[:, :size]
    got = rms_norm(x, norm.weight, norm.eps)
    assert got.is_contiguous()
    # Two roundings, either of which may fall to the other side of a tie.
    torch.testing.assert_close(got, norm(x), rtol=2.1 * torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(rms_norm(x[-1:], norm.weight, norm.eps), got[-1:]), "a row depends on its neighbours"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_by_one_plus_weight_is_rounded_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = _norm(80, dtype, offset=True)
    x, residual = torch.randn(3, 80).to(dtype), 4 * torch.randn(3, 80).to(dtype)
    rtol = 1.1 * torch.finfo(dtype).eps
    torch.testing.assert_close(rms_norm(x, norm.weight, norm.eps, offset=True), norm(x), rtol=rtol, atol=1e-6)
    want = norm(x, residual.clone())
    got = fused_add_rms_norm(x, residual, norm.weight, norm.eps, offset=True)
    torch.testing.assert_close(got, want, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize(("rows", "size"), [(5, 256), (3, 80), (1, 300)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_is_added_before_the_norm(rows: int, size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = _norm(size, dtype)
    x, residual = torch.randn(rows, size).to(dtype), 4 * torch.randn(rows, size).to(dtype)
    want_residual = residual.clone()
    want = norm(x, want_residual)
    alone_x, alone_residual = x[-1:].clone(), residual[-1:].clone()
    got = fused_add_rms_norm(x, residual, norm.weight, norm.eps)
    assert torch.equal(residual, want_residual), "a sum of two values is rounded once"
    torch.testing.assert_close(got, want, rtol=2.1 * torch.finfo(dtype).eps, atol=1e-6)
    alone = fused_add_rms_norm(alone_x, alone_residual, norm.weight, norm.eps)
    assert torch.equal(alone, got[-1:]), "a row depends on its neighbours"


@pytest.mark.parametrize(("rows", "size"), [(3, 80), (2, 1500)])  # less than one program's piece, and more
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_and_mul(rows: int, size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    merged = 4 * torch.randn(rows, 2 * size + 8).to(dtype)
    gate_up = merged[:, : 2 * size]
    got = silu_and_mul(gate_up)
    assert got.is_contiguous()
    # Two roundings; in float32 the exponential adds a few units in the last place.
    rtol = max(2.1 * torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(got, gated(gate_up, "silu", invariant=False), rtol=rtol, atol=1e-6)
    assert torch.equal(silu_and_mul(gate_up[-1:]), got[-1:]), "a row depends on its neighbours"


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_and_mul(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gate_up = 3 * torch.randn(3, 160).to(dtype)
    # Two roundings; in float32 the exponential's error is that of an argument of up to a hundred.
    rtol = max(2.1 * torch.finfo(dtype).eps, 1e-5)
    want = gated(gate_up, "gelu_tanh", invariant=False)
    torch.testing.assert_close(gelu_tanh_and_mul(gate_up), want, rtol=rtol, atol=1e-6)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_silu_far_from_zero() -> None:
    gate = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4]])
    got = silu_and_mul(torch.cat((gate, torch.ones(1, 5)), dim=1))
    torch.testing.assert_close(got, torch.tensor([[0.0, 0.0, 0.0, 100.0, 1e4]]), rtol=1e-6, atol=1e-6)


class HeadsCase:
    """A merged projection of some tokens, where its keys and values go, and what must come of it."""

    def __init__(
        self, heads: int, kv_heads: int, size: int, dtype: torch.dtype, *, norm: bool, offset: bool = False
    ) -> None:
        torch.manual_seed(0)
        tokens, blocks, positions = 7, 3, 90
        self.split = (heads, kv_heads, kv_heads)
        self.qkv = torch.randn(tokens, (heads + 2 * kv_heads) * size + 16).to(dtype)[:, :-16]
        angles = 6.3 * torch.rand(positions, size // 2)
        self.table = torch.cat((angles.cos(), angles.sin()), dim=1)
        self.positions = torch.randint(0, positions, (tokens + 1,))[1:]  # a slice, as of a step's upload
        self.slots = torch.randperm(blocks * BLOCK)[: tokens + 1][1:]
        self.slots[[2, 6]] = -1
        shape = (2, blocks, kv_heads, BLOCK, size)
        self.caches = torch.full(shape, UNWRITTEN, dtype=dtype)
        self.norms = (_norm(size, dtype, offset=offset), _norm(size, dtype, offset=offset)) if norm else None
        self.offset = offset

    def run(
        self, qkv: Tensor, caches: Tensor, tokens: slice = slice(None), scales: tuple[Tensor, ...] = (None, None)
    ) -> Tensor:  # fmt: skip
        q_norm, k_norm = self.norms or (None, None)
        return rotate_and_store(
            qkv[tokens], self.table, self.positions[tokens], caches[0], caches[1], self.slots[tokens],
            q_norm=None if q_norm is None else q_norm.weight, k_norm=None if k_norm is None else k_norm.weight,
            eps=1e-5, norm_offset=self.offset, k_scale=scales[0], v_scale=scales[1],
        )  # fmt: skip

    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, H, D], caches, and bounds of the queries' and keys' error [T, H + K, D]."""
        size = self.table.shape[1]
        heads, table = self.qkv.unflatten(1, (-1, size)), self.table[self.positions]
        q, k, v = heads.split(self.split, dim=1)
        if self.norms is not None:
            q, k = self.norms[0](q), self.norms[1](k)
        caches = self.caches.clone()
        store_kv_ref(rotate(k, table), v, caches[0], caches[1], self.slots)
        return rotate(q, table), caches, self._bound(torch.cat((q, k), dim=1), table)

    def _bound(self, x: Tensor, table: Tensor) -> Tensor:
        """One rounding of the result may fall to the other side of a tie, and two of each value that the norm made.

        float32 sums in another order add some 1e-7 of a value.
        """
        eps = torch.finfo(x.dtype).eps
        of_values = (2.1 * eps if self.norms is not None else 0.0) + 5e-7
        magnitude = x.abs().float() + x.abs().float().roll(table.shape[1] // 2, -1)
        return of_values * magnitude + 1.1 * eps * rotate(x, table).abs().float()


# Groups that fill a tile and do not, heads that share a program and do not, head sizes of a power of two and not.
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(8, 2, 64), (4, 4, 80), (7, 1, 128), (6, 3, 22), (12, 4, 128)]
)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotate_and_store(heads: int, kv_heads: int, size: int, norm: bool, dtype: torch.dtype) -> None:
    case = HeadsCase(heads, kv_heads, size, dtype, norm=norm)
    want, want_caches, bound = case.expected()
    before, got_caches = case.qkv.clone(), case.caches.clone()
    got = case.run(case.qkv, got_caches)
    live = case.slots >= 0
    assert ((got - want).abs().float() <= bound[:, :heads])[live].all(), "queries"
    blocks, offsets = case.slots[live] // BLOCK, case.slots[live] % BLOCK
    keys, want_keys = got_caches[0][blocks, :, offsets], want_caches[0][blocks, :, offsets]
    assert ((keys - want_keys).abs().float() <= bound[live, heads:]).all(), "keys"
    assert torch.equal(got_caches[1], want_caches[1]), "values, and slots that are not this step's"
    assert torch.equal(got_caches[0] == UNWRITTEN, want_caches[0] == UNWRITTEN), (
        "slots that are not this step's"
    )
    assert torch.equal(case.qkv[~live], before[~live]), "padding was touched"
    assert torch.equal(case.qkv[:, heads * size :], before[:, heads * size :]), (
        "keys and values are only read"
    )

    alone_caches = case.caches.clone()
    alone = case.run(before, alone_caches, slice(3, 4))
    assert torch.equal(alone, got[3:4]), "a token's queries depend on its neighbours"
    block, offset = case.slots[3] // BLOCK, case.slots[3] % BLOCK
    assert torch.equal(alone_caches[0, block, :, offset], got_caches[0, block, :, offset])


@pytest.mark.parametrize("dtype", DTYPES)
def test_head_norms_by_one_plus_weight(dtype: torch.dtype) -> None:
    case = HeadsCase(4, 2, 64, dtype, norm=True, offset=True)
    want, want_caches, bound = case.expected()
    got_caches, live = case.caches.clone(), case.slots >= 0
    got = case.run(case.qkv, got_caches)
    assert ((got - want).abs().float() <= bound[:, :4])[live].all(), "queries"
    blocks, offsets = case.slots[live] // BLOCK, case.slots[live] % BLOCK
    keys, want_keys = got_caches[0][blocks, :, offsets], want_caches[0][blocks, :, offsets]
    assert ((keys - want_keys).abs().float() <= bound[live, 4:]).all(), "keys"


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "dtype"), [(8, 2, 64, torch.bfloat16), (6, 3, 22, torch.float32)]
)
@pytest.mark.parametrize("stored", list(QUANTIZED_DTYPES), ids=list(QUANTIZED_DTYPES.values()))
def test_rotate_and_store_into_a_quantized_cache(
    heads: int, kv_heads: int, size: int, dtype: torch.dtype, stored: torch.dtype
) -> None:
    """Keys and values are what the kernel writes to an unquantized cache, then rounded as defined: the same bits."""
    case = HeadsCase(heads, kv_heads, size, dtype, norm=True)
    qkv, plain = case.qkv.clone(), case.caches.clone()
    q = case.run(qkv, plain)
    live = case.slots >= 0
    blocks, offsets = case.slots[live] // BLOCK, case.slots[live] % BLOCK
    k, v = (cache[blocks, :, offsets] for cache in plain)
    caches = [torch.full(plain.shape, 7.0).to(stored) for _ in range(2)]
    scales = [[new_scales(cache) for cache in pair] for pair in caches]
    if stored != torch.int8:
        for pair in scales:
            pair[0] *= 0.01 * (1 + torch.arange(kv_heads))
            pair[1] *= 3.0
    got = case.run(case.qkv, caches[0], scales=scales[0])
    store_quantized_kv_ref(k, v, caches[1][0], caches[1][1], case.slots[live], *scales[1])
    assert torch.equal(got[live], q[live]), "queries"
    assert torch.equal(caches[0].view(torch.int8), caches[1].view(torch.int8))
    for ours, theirs in zip(*scales, strict=True):
        assert torch.equal(ours, theirs)


def test_a_cache_of_another_dtype_is_refused() -> None:
    case = HeadsCase(2, 1, 64, torch.float32, norm=False)
    with pytest.raises(AssertionError, match="float16"):
        case.run(case.qkv, case.caches.half())


def test_no_tokens_is_no_work() -> None:
    assert rms_norm(torch.empty(0, 64), torch.ones(64), 1e-5).shape == (0, 64)
    assert fused_add_rms_norm(torch.empty(0, 64), torch.empty(0, 64), torch.ones(64), 1e-5).shape == (0, 64)
    assert silu_and_mul(torch.empty(0, 64)).shape == (0, 32)
    case = HeadsCase(4, 2, 64, torch.float32, norm=True)
    caches = case.caches.clone()
    assert case.run(case.qkv, caches, slice(0, 0)).shape == (0, 4, 64)
    assert (caches == UNWRITTEN).all()
