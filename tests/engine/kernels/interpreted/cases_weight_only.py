"""Weight-only products against the definition, in float64 on the values that the formats hold."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from engine.kernels.quantized_weight import Int4Weight, Int8Weight, quantize_int4, quantize_int8
from engine.kernels.weight_only import FEW_TOKENS, weight_only_linear, weight_only_linear_ref
from engine.models.quantized import QuantizedLinear
from engine.quantization.stored_weight import StoredWeight, merge

Quantizer = Callable[[Tensor], Int8Weight | Int4Weight]
BOTH = pytest.mark.parametrize("quantize", [quantize_int8, quantize_int4])
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def _case(
    quantize: Quantizer, tokens: int, size: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, Int8Weight | Int4Weight, Tensor]:
    """x, a view with a row stride of its own; a weight whose rows and groups differ in size and centre; a bias."""
    generator = torch.Generator().manual_seed(tokens + size[0])
    weight = torch.randn(size, generator=generator) * torch.rand(size[0], 1, generator=generator)
    weight[:, size[1] // 2 :] += 0.5
    x = torch.randn(tokens, size[1] + 16, generator=generator).to(dtype)[:, : size[1]]
    return x, quantize(weight), torch.randn(size[0], generator=generator).to(dtype)


def _assert_close(got: Tensor, x: Tensor, weight: Int8Weight | Int4Weight, bias: Tensor | None) -> None:
    """One rounding to x's dtype, and of the float32 sum at most as many roundings as it has terms, in any order."""
    wide, exact = weight.dequantize().double(), x.double()
    want = exact @ wide.t()
    terms = exact.abs() @ wide.abs().t()
    if bias is not None:
        want, terms = want + bias.double(), terms + bias.double().abs()
    info = torch.finfo(x.dtype)
    allowed = (
        0.51 * info.eps * want.abs() + (x.shape[1] + 3) * 2.0**-24 * terms + info.smallest_normal * info.eps
    )
    assert got.dtype == x.dtype
    excess = ((got.double() - want).abs() / allowed).max().item()
    assert excess <= 1.0, f"the error is {excess:.2f} of what rounding allows"  # false for not-a-number too


SIZES = [(24, 44), (128, 512), (150, 640), (40, 300)]


# Tokens: one, some, as many as either form takes, and more than a tile. Sizes: smaller than every tile and no multiple
# of a group; multiples of all tiles; more outputs than a tile, whole groups but no whole step; neither. Each number of
# tokens meets the most masked size, each size either form: the masks of outputs, inputs and tokens are independent.
@BOTH
@DTYPES
@pytest.mark.parametrize(
    ("tokens", "size"),
    [(tokens, SIZES[-1]) for tokens in (1, FEW_TOKENS, FEW_TOKENS + 1, 64, 65, 130)]
    + [(tokens, size) for size in SIZES for tokens in (5, 70)],
)
def test_products_agree_with_the_definition(
    quantize: Quantizer, dtype: torch.dtype, tokens: int, size: tuple[int, int]
) -> None:
    x, weight, bias = _case(quantize, tokens, size, dtype)
    _assert_close(weight_only_linear(x, weight, bias), x, weight, bias)
    _assert_close(weight_only_linear_ref(x, weight, bias), x, weight, bias)


@BOTH
def test_without_a_bias_and_into_a_given_tensor(quantize: Quantizer) -> None:
    for tokens in (3, 40):
        x, weight, _ = _case(quantize, tokens, (40, 300), torch.bfloat16)
        wide = torch.full((tokens, 60), 7.0, dtype=torch.bfloat16)
        out = wide[:, 10:50]
        assert weight_only_linear(x, weight, out=out) is out
        _assert_close(out, x, weight, None)
        assert (wide[:, :10] == 7).all()
        assert (wide[:, 50:] == 7).all()


@BOTH
@DTYPES
def test_a_row_of_few_tokens_has_the_same_bits_whatever_is_beside_it(
    quantize: Quantizer, dtype: torch.dtype
) -> None:
    x, weight, bias = _case(quantize, FEW_TOKENS, (70, 640), dtype)
    together = weight_only_linear(x, weight, bias)
    for first, past in ((0, 1), (9, 10), (4, 11)):
        assert torch.equal(weight_only_linear(x[first:past], weight, bias), together[first:past])


@BOTH
@DTYPES
def test_deterministic_rows_have_the_same_bits_for_any_number_of_tokens(
    quantize: Quantizer, dtype: torch.dtype
) -> None:
    x, weight, bias = _case(quantize, 150, (70, 300), dtype)
    together = weight_only_linear(x, weight, bias, deterministic=True)
    _assert_close(together, x, weight, bias)
    for first, past in ((0, 1), (70, 80), (100, 140), (3, 149)):
        alone = weight_only_linear(x[first:past], weight, bias, deterministic=True)
        assert torch.equal(alone, together[first:past])


@BOTH
def test_not_a_number_in_one_row_stays_in_it(quantize: Quantizer) -> None:
    for tokens in (4, 20):
        x, weight, bias = _case(quantize, tokens, (24, 300), torch.bfloat16)
        x[2, 5] = float("nan")
        got = weight_only_linear(x, weight, bias)
        assert got[2].isnan().all()
        assert not torch.cat((got[:2], got[3:])).isnan().any()


@BOTH
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_quantized_layer_multiplies_with_what_it_holds(quantize: Quantizer, deterministic: bool) -> None:
    x, weight, bias = _case(quantize, 5, (40, 300), torch.bfloat16)
    got = QuantizedLinear(weight, bias, deterministic=deterministic)(x)
    assert torch.equal(got, weight_only_linear(x, weight, bias, deterministic=deterministic))
    _assert_close(got, x, weight, bias)


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [5, 20])
def test_a_checkpoint_s_weight_is_multiplied_with_its_own_scales(
    scale_dtype: torch.dtype, tokens: int
) -> None:
    """Every zero point, numbers at both ends, in int4 rows of one group beside groups of 128; int8 down to -128."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 300, generator=generator).half()
    values = torch.randint(0, 16, (40, 300), generator=generator).short()
    held = []
    for group_size in (300, 128):
        groups = -(-300 // group_size)
        scales = (torch.rand(40, groups, generator=generator) + 0.01).to(scale_dtype)
        zeros = (torch.arange(40 * groups) % 16).view(40, groups).short()
        fused = StoredWeight(values=values, scales=scales, zeros=zeros, group_size=group_size).fuse()
        assert isinstance(fused, Int4Weight)
        held.append(fused)
    both = merge(list(held))
    assert isinstance(both, Int4Weight)
    assert both.scales.dtype == scale_dtype
    _assert_close(weight_only_linear(x, both), x, both, None)
    rows = StoredWeight(values=values * 17 - 128, scales=held[0].scales.t()[:, :1], group_size=300).fuse()
    assert isinstance(rows, Int8Weight)
    assert rows.values.min() == -128
    _assert_close(weight_only_linear(x, rows), x, rows, None)


@BOTH
def test_no_tokens_is_no_work(quantize: Quantizer) -> None:
    _, weight, bias = _case(quantize, 1, (24, 44), torch.float16)
    assert weight_only_linear(torch.empty(0, 44, dtype=torch.float16), weight, bias).shape == (0, 24)


@BOTH
def test_what_the_kernels_cannot_do_is_refused(quantize: Quantizer) -> None:
    x, weight, bias = _case(quantize, 2, (24, 44), torch.bfloat16)
    with pytest.raises(AssertionError, match="float32"):
        weight_only_linear(x.float(), weight, bias)
    with pytest.raises(AssertionError, match="44"):
        weight_only_linear(x[:, :40], weight, bias)
