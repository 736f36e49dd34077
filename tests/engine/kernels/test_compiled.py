"""Compiles the kernels for sm_80 and sm_90, without a GPU, and reads what the hardware would be given.

Proves: attention uses matrix units (wgmma on sm_90 where a tile fills a warpgroup, else mma.sync), no registers are
spilled but a few bytes in a form named below, shared memory and registers fit one multiprocessor, memory is read and
written 16 bytes at a time.
Does not prove speed. Seen under Triton 3.7.1 and 3.6.0; another one than the installed runs with its folder first on PYTHONPATH
(AGENTS.md, commands).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton

from engine.kernels.attention_tiles import AttentionShape, Mode, Variant, combine_variant, tile_for, variant
from engine.kernels.expert_linear import expert_constants, expert_linear_kernel, expert_options
from engine.kernels.invariant_linear import invariant_linear_kernel, linear_constants, linear_options
from engine.kernels.paged_attention import combine_kernel, paged_attention_kernel
from engine.kernels.rms_norm import rms_norm_constants, rms_norm_kernel, rms_norm_warps
from engine.kernels.rotary import (
    rotate_and_store_constants,
    rotate_and_store_kernel,
    rotate_and_store_warps,
)
from engine.kernels.silu_and_mul import SILU_BLOCK, SILU_WARPS, silu_and_mul_kernel
from engine.kernels.store_kv import STORE_WARPS, store_constants, store_kv_kernel

TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
CompileKernel = Callable[..., Any]

both_targets = pytest.mark.parametrize("capability", [80, 90])
one_target = pytest.mark.parametrize(
    "capability", [pytest.param(80, marks=pytest.mark.full), 90]
)  # the other in the long proofs


def attention_types(dtype: torch.dtype) -> dict[str, str]:
    value = f"*{NAMES[dtype]}"
    tensors = dict.fromkeys(("out", "q", "k_cache", "v_cache"), value)
    indices = dict.fromkeys(("block_tables", "seq_lens", "query_start"), "*i32")
    partials = dict.fromkeys(("part_acc", "part_peak", "part_total"), "*fp32")
    numbers = dict.fromkeys(
        ("stride_qt", "stride_ot", "stride_table", "first_row", "num_rows", "num_splits"), "i32"
    )
    return {**tensors, **indices, **partials, **numbers, "scale_log2": "fp32"}


def _attention_arguments(form: Variant, dtype: torch.dtype) -> tuple[Any, ...]:
    return paged_attention_kernel, attention_types(dtype), form.constants, form.options


CASES = [
    (AttentionShape(8, 4, size, 16, dtype, window), mode, deterministic)
    for size, dtype, window in [
        (64, torch.bfloat16, None), (128, torch.bfloat16, None), (128, torch.float16, None), (64, torch.float16, 4096),
    ]
    for mode in (Mode.DECODE, Mode.PREFILL)
    for deterministic in (False, True)
]  # fmt: skip
CASES += [
    (AttentionShape(8, 4, 128, 16, torch.bfloat16), Mode.DECODE_DIRECT, False),
    (AttentionShape(4, 7, 128, 32, torch.bfloat16, 4096), Mode.DECODE_DIRECT, False),
    (AttentionShape(32, 1, 80, 16, torch.bfloat16), Mode.PREFILL, False),  # padded head, no groups
    (
        AttentionShape(4, 7, 128, 32, torch.bfloat16, 4096),
        Mode.PREFILL,
        False,
    ),  # a group that divides no tile
]

# Their head size and their type are each also another case's: long proofs.
LIKE_OTHERS = [AttentionShape(8, 4, 64, 16, torch.bfloat16), AttentionShape(8, 4, 128, 16, torch.float16)]


def _name(case: tuple[AttentionShape, Mode, bool]) -> str:
    shape, mode, deterministic = case
    words = [
        mode.value,
        f"{shape.num_kv_heads * shape.group}h{shape.num_kv_heads}",
        f"d{shape.head_size}",
        NAMES[shape.dtype],
    ]
    return "-".join(
        [*words, *(["window"] if shape.window else []), *(["deterministic"] if deterministic else [])]
    )


@one_target
@pytest.mark.parametrize(
    ("shape", "mode", "deterministic"),
    [pytest.param(*case, marks=pytest.mark.full if case[0] in LIKE_OTHERS else ()) for case in CASES],
    ids=map(_name, CASES),
)
def test_attention_compiles_to_matrix_instructions_and_fits(
    capability: int,
    shape: AttentionShape,
    mode: Mode,
    deterministic: bool,
    compile_kernel: CompileKernel,
    record_property: Any,
) -> None:
    form = variant(shape, mode, deterministic)
    built = compile_kernel(capability, *_attention_arguments(form, shape.dtype))
    # Prefill over heads of 128 fills a thread's 255 registers on sm_80. What has more to keep, a second accumulator for the
    # split or the window's bounds, spills 72 and 0 bytes under Triton 3.7, 80 and 32 under 3.6. Decode over heads of 64 in
    # bfloat16 spills two registers under 3.6, deterministic, and none under 3.7.
    more_to_keep = mode is Mode.PREFILL and (deterministic or shape.window is not None)
    tight = capability == 80 and more_to_keep and shape.head_size == 128
    two_over = capability == 80 and mode is Mode.DECODE and deterministic and TRITON < (3, 7)
    built.assert_fits(spilled_bytes=128 if tight else 8 if two_over else 0)
    whole_warpgroup = tile_for(shape, mode, deterministic).block_m >= 64
    products = {"wgmma": built.ptx.count("wgmma.mma_async"), "mma": built.ptx.count("mma.sync")}
    assert products["wgmma" if capability == 90 and whole_warpgroup else "mma"] > 0, products
    copies = re.findall(r"cp\.async\.cg\.shared\.global[^;]*, 0x10,", built.ptx)
    assert len(copies) >= 4, "keys and values are not copied 16 bytes at a time"
    figures = {
        "registers": built.registers,
        "spilled_bytes": built.stack_bytes,
        "shared_bytes": built.shared_bytes,
        **products,
    }
    for name, figure in figures.items():
        record_property(name, figure)
    print(f"sm_{capability}", _name((shape, mode, deterministic)), figures)


@both_targets
@pytest.mark.parametrize("size", [64, 128])
def test_combine_fits_and_prefetches(capability: int, size: int, compile_kernel: CompileKernel) -> None:
    form = combine_variant(AttentionShape(8, 4, size, 16, torch.bfloat16))
    built = compile_kernel(
        capability, combine_kernel, attention_types(torch.bfloat16), form.constants, form.options
    )
    built.assert_fits()
    assert built.ptx.count("cp.async.c") > form.constants["STAGES"], "partials are not loaded ahead"


def test_a_spill_would_be_seen(compile_kernel: CompileKernel) -> None:
    """The same kernel with too few registers: the figures above are read, not assumed."""
    form = variant(AttentionShape(8, 4, 128, 16, torch.bfloat16), Mode.PREFILL, False)
    starved = Variant(form.constants, {**form.options, "maxnreg": 96})
    built = compile_kernel(90, *_attention_arguments(starved, torch.bfloat16))
    assert built.stack_bytes > 0
    with pytest.raises(AssertionError, match="spilled"):
        built.assert_fits()


@both_targets
def test_float32_stays_out_of_the_matrix_units_which_would_round_it(
    capability: int, compile_kernel: CompileKernel
) -> None:
    shape = AttentionShape(8, 4, 128, 16, torch.float32)
    built = compile_kernel(capability, *_attention_arguments(variant(shape, Mode.DECODE, False), shape.dtype))
    built.assert_fits(
        spilled_bytes=8 if capability == 80 else 0
    )  # two registers of 64, where loads overlap less
    assert "wgmma" not in built.ptx
    assert "mma.sync" not in built.ptx


def _assert_moves_16_bytes_a_thread(built: Any) -> None:
    built.assert_fits()
    assert re.search(r"ld\.global\.v4\.b32", built.ptx), "values are loaded in small pieces"
    assert re.search(r"st\.global\.v4\.b32", built.ptx), "values are stored in small pieces"


@both_targets
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_store_kv(capability: int, dtype: torch.dtype, compile_kernel: CompileKernel) -> None:
    types = dict.fromkeys(("k", "v", "k_cache", "v_cache"), f"*{NAMES[dtype]}")
    types |= {"slot_mapping": "*i64", "stride_kt": "i32", "stride_vt": "i32"}
    _assert_moves_16_bytes_a_thread(
        compile_kernel(
            capability, store_kv_kernel, types, store_constants(8, 128, 16), {"num_warps": STORE_WARPS}
        )
    )


@both_targets
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("size", [2048, 5120, 16384])  # few warps; not a power of two; the widest published
def test_rms_norm(capability: int, size: int, add: bool, compile_kernel: CompileKernel) -> None:
    types = {**dict.fromkeys(("out", "x", "residual", "weight"), "*bf16"), "stride_x": "i32", "eps": "fp32"}
    _assert_moves_16_bytes_a_thread(
        compile_kernel(
            capability,
            rms_norm_kernel,
            types,
            rms_norm_constants(size, add=add),
            {"num_warps": rms_norm_warps(size)},
        )
    )


@both_targets
@pytest.mark.parametrize(
    ("size", "gelu"), [(4864, False), (14336, False), (14336, True)]
)  # last pieces full or not
def test_silu_and_mul(capability: int, size: int, gelu: bool, compile_kernel: CompileKernel) -> None:
    types = {"out": "*bf16", "gate_up": "*bf16", "stride_token": "i32"}
    _assert_moves_16_bytes_a_thread(
        compile_kernel(
            capability,
            silu_and_mul_kernel,
            types,
            {"SIZE": size, "BLOCK": SILU_BLOCK, "GELU": gelu},
            {"num_warps": SILU_WARPS},
        )
    )


# Heads of Llama 8B, Qwen3 0.6B, Qwen2 7B (groups of 7), a model without groups, 71 queries on one key, and heads of 256.
@one_target
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "norm"),
    [
        (32, 8, 128, False), (16, 8, 128, True), (28, 4, 128, False), (32, 32, 64, True), (71, 1, 64, True),
        (16, 8, 256, True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rotate_and_store(
    capability: int,
    heads: int,
    kv_heads: int,
    size: int,
    norm: bool,
    dtype: torch.dtype,
    compile_kernel: CompileKernel,
) -> None:
    constants = rotate_and_store_constants(heads, kv_heads, size, 16, norm=norm)
    types = dict.fromkeys(("qkv", "k_cache", "v_cache", "q_weight", "k_weight"), f"*{NAMES[dtype]}")
    types |= {
        "table": "*fp32",
        "positions": "*i64",
        "slot_mapping": "*i64",
        "stride_token": "i32",
        "eps": "fp32",
    }
    options = {"num_warps": rotate_and_store_warps(constants), "enable_fp_fusion": False}
    plain = {**constants, "CACHE": "", "k_scale": None, "v_scale": None}
    built = compile_kernel(capability, rotate_and_store_kernel, types, plain, options)
    _assert_moves_16_bytes_a_thread(built)


@one_target
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("size_in", "size_out"), [(4096, 6144), (14336, 4096), (300, 500)])
def test_invariant_linear(
    capability: int, dtype: torch.dtype, size_in: int, size_out: int, compile_kernel: CompileKernel
) -> None:
    constants = linear_constants(size_in, size_out, True, dtype)
    types = dict.fromkeys(("out", "x", "weight", "bias"), f"*{NAMES[dtype]}")
    types |= dict.fromkeys(("num_rows", "stride_x", "stride_out"), "i32")
    built = compile_kernel(capability, invariant_linear_kernel, types, constants, linear_options(dtype))
    built.assert_fits()
    if dtype != torch.float32:
        assert ("wgmma" if capability == 90 else "mma.sync") in built.ptx


@both_targets
def test_expert_linear(capability: int, compile_kernel: CompileKernel) -> None:
    constants = expert_constants(4096, 14336, 8, torch.bfloat16, gather=True)
    types = dict.fromkeys(("out", "x", "weight"), "*bf16") | {
        "starts": "*i64",
        "rows": "*i64",
        "stride_x": "i32",
    }
    built = compile_kernel(capability, expert_linear_kernel, types, constants, expert_options(torch.bfloat16))
    built.assert_fits()
    assert "mma.sync" in built.ptx
