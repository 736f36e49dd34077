"""The packed product against ``packed_linear_ref``, and its bitwise promises."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.packed_linear import pack_weight, packed_linear, packed_linear_ref

# (in, out): whole panels; one panel and a part; a single output; inputs that are odd; more than a tile of rows below.
SHAPES = [(256, 512), (704, 256), (64, 100), (32, 1), (63, 70)]
ROWS = [1, 2, 5, 6, 7, 47, 48, 49, 130]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_matches_the_reference(library, inputs, outputs, dtype):
    generator = torch.Generator().manual_seed(inputs)
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    bias = torch.randn(outputs, generator=generator).to(dtype)
    packed, plain = pack_weight(library, weight, bias), pack_weight(library, weight)
    for rows in ROWS:
        x = torch.randn(rows, inputs, generator=generator).to(dtype)
        tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
        torch.testing.assert_close(
            packed_linear(library, x, packed), packed_linear_ref(x, weight, bias), **tolerance
        )
        torch.testing.assert_close(
            packed_linear(library, x, plain), packed_linear_ref(x, weight), **tolerance
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_row_has_the_same_bits_in_any_batch(library, dtype):
    x, weight = torch.randn(130, 256).to(dtype), torch.randn(320, 256).to(dtype)
    packed = pack_weight(library, weight)
    whole = packed_linear(library, x, packed)
    for rows in ROWS:
        parts = torch.cat([packed_linear(library, part, packed) for part in x.split(rows)])
        assert torch.equal(parts, whole)


def test_bfloat16_panels_give_the_bits_of_float32_panels(library):
    x, weight = torch.randn(33, 256), torch.randn(100, 256).bfloat16().float()
    narrow, wide = pack_weight(library, weight), pack_weight(library, weight, narrow=False)
    assert (narrow.values.dtype, wide.values.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(packed_linear(library, x, narrow), packed_linear(library, x, wide))


def test_weights_that_bfloat16_does_not_hold_keep_their_bits(library):
    weight = torch.randn(64, 32)
    assert pack_weight(library, weight).values.dtype == torch.float32


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_panels_hold_the_weight_as_they_are_defined(library, source, narrow, gated):
    inputs, inner, width = 70, 75, library.panel_width
    weight = torch.randn(2 * inner, inputs).bfloat16().to(source)
    rows = list(weight)
    if gated:  # half a panel of gates, then what they gate; both parts end in zeros
        half, none = width // 2, torch.zeros(inputs, dtype=source)
        starts = range(0, inner, half)
        padded = [[*part, *[none] * half] for part in (rows[:inner], rows[inner:])]
        rows = [row for start in starts for part in padded for row in part[start : start + half]]
    rows += [torch.zeros(inputs, dtype=source)] * (-len(rows) % width)
    panels = torch.stack(rows).view(-1, width, inputs).transpose(1, 2)  # [panel, k, column]
    if narrow:
        panels = panels.unflatten(1, (-1, 2)).transpose(2, 3)  # [panel, k / 2, column, 2]
    packed = pack_weight(library, weight, gated=gated, narrow=narrow)
    assert packed.values.dtype == (torch.bfloat16 if narrow else torch.float32)
    assert torch.equal(packed.values.float(), panels.flatten().float())
