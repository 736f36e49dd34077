"""Compiles the LoRA kernels for sm_80 and sm_90, without a GPU, and launches them on a device that only records."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton

from engine.kernels.grouped_lora import (
    LORA_OPTIONS,
    expand_constants,
    lora_add,
    lora_expand_kernel,
    lora_shrink_kernel,
    shrink_constants,
)
from engine.kernels.lora import SlotWeights, tokens_by_slot

NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
# in, outputs of each part, rank: q, k, v of an 8B model at the usual rank, and its down projection at the highest.
LAYERS = [(4096, (4096, 1024, 1024), 16), (12288, (4096,), 256)]


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.full), 90])
@pytest.mark.parametrize(
    "layer",
    [pytest.param(LAYERS[0], id="qkv-16"), pytest.param(LAYERS[1], id="down-256", marks=pytest.mark.full)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.full)])
def test_fits_and_multiplies_16_bits_in_the_matrix_units(
    capability: int,
    layer: tuple[int, tuple[int, ...], int],
    dtype: torch.dtype,
    compile_kernel: Callable[..., Any],
) -> None:
    size_in, sizes, rank = layer
    value, columns = f"*{NAMES[dtype]}", len(sizes) * rank
    shrink = shrink_constants(size_in, columns, dtype)
    common = {"order": "*i32", "starts": "*i32", "num_tokens": "i32", "stride_slot": "i32", "low": "*fp32"}
    types = {**common, "x": value, "a": value, "stride_x": "i32"}
    first = compile_kernel(capability, lora_shrink_kernel, types, shrink, LORA_OPTIONS)
    types = {**common, "y": value, "b": value, "scales": "*fp32", "stride_y": "i32", "stride_scale": "i32"}
    expand = expand_constants(sizes, rank, shrink["SPLITS"], dtype)
    second = compile_kernel(capability, lora_expand_kernel, types, expand, LORA_OPTIONS)
    for built in (first, second):
        built.assert_fits(spilled_bytes=8)  # two registers of 56, on sm_90, where a thread may have 255
        in_matrix_units = built.ptx.count("mma.sync") + built.ptx.count("wgmma.mma_async")
        # float32 stays outside, where it would be rounded.
        assert (in_matrix_units > 0) == (dtype == torch.bfloat16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here: tests/gpu launches for real")
@pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: kernels cannot be compiled"
)
def test_launches_follow_from_the_number_of_tokens_alone(launches: list[Any]) -> None:
    """What a graph replays must not depend on which token uses which adapter; and no launch compiles anew."""
    size_in, sizes, rank, slots = 256, (256, 64, 64), 16, 4
    a = torch.zeros(slots, 3 * rank * size_in + 384 * rank, dtype=torch.bfloat16)
    weights = SlotWeights(
        a[:, : 3 * rank * size_in].view(slots, 3 * rank, size_in), a[:, 3 * rank * size_in :].view(slots, 384, rank),
        torch.ones(slots, 2 * 7)[:, :3], sizes,
    )  # fmt: skip
    seen = []
    for tokens, chosen in ((33, -1), (33, 0), (33, 3), (1, 2), (400, 1)):
        x, y = (torch.zeros(tokens, size, dtype=torch.bfloat16) for size in (size_in, 384))
        lora_add(y, x, weights, tokens_by_slot(torch.full((tokens,), chosen, dtype=torch.int32), slots))
        seen.append(tuple(launches[-2:]))
    assert len(launches) == 2 * len(seen)
    assert seen[0] == seen[1] == seen[2]
    assert len({launch.digest for launch in launches}) == 2
