"""Compiles every attention variant for sm_90, without a GPU, and reads what the hardware would be given.

Proves: matrix units are used (wgmma where a tile fills a warpgroup, mma.sync in small decode tiles), nothing is spilled to
memory, shared memory and registers fit one multiprocessor, keys and values arrive by 16-byte asynchronous copies.
Does not prove speed.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine.kernels.attention_tiles import AttentionShape, Mode, Variant, combine_variant, tile_for, variant
from engine.kernels.paged_attention import combine_kernel, paged_attention_kernel
from engine.kernels.rms_norm import rms_norm_constants, rms_norm_kernel, rms_norm_warps
from engine.kernels.rotary import ROTARY_WARPS, rotary_constants, rotary_kernel
from engine.kernels.store_kv import STORE_WARPS, store_constants, store_kv_kernel

SHARED_BYTES = 227 * 1024  # the most that one program may take on compute capability 9.0
REGISTERS = 65536  # of one multiprocessor
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

pytestmark = [
    pytest.mark.skipif(
        triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: kernels cannot be compiled"
    ),
    pytest.mark.skipif(not CUOBJDUMP.exists(), reason=f"this Triton brings no {CUOBJDUMP.name}"),
]


@dataclass(frozen=True)
class Compiled:
    ptx: str
    shared_bytes: int
    num_warps: int
    registers: int  # per thread
    stack_bytes: int  # where spilled registers live
    local_bytes: int


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))


def compile_sm90(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, int],
    options: Mapping[str, int],
    folder: Path,
) -> Compiled:
    """Compile as a launch would whose pointers and strides are multiples of 16, where the kernel looks at that."""
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if name not in constants
        and not kernel.params[index].do_not_specialize
        and (types[name].startswith("*") or name.startswith("stride"))
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=dict(constants), attrs=aligned)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(options))
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(built.asm["cubin"])
    usage = subprocess.run(
        [str(CUOBJDUMP), "--dump-resource-usage", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return Compiled(
        built.asm["ptx"],
        built.metadata.shared,
        built.metadata.num_warps,
        found["REG"],
        found["STACK"],
        found["LOCAL"],
    )


def attention_types(dtype: torch.dtype) -> dict[str, str]:
    value = f"*{NAMES[dtype]}"
    tensors = dict.fromkeys(("out", "q", "k_cache", "v_cache"), value)
    indices = dict.fromkeys(("block_tables", "seq_lens", "query_start"), "*i32")
    partials = dict.fromkeys(("part_acc", "part_peak", "part_total"), "*fp32")
    numbers = dict.fromkeys(
        ("stride_qt", "stride_ot", "stride_table", "first_row", "num_rows", "num_splits"), "i32"
    )
    return {**tensors, **indices, **partials, **numbers, "scale_log2": "fp32"}


def _compile_attention(form: Variant, dtype: torch.dtype, folder: Path) -> Compiled:
    return compile_sm90(paged_attention_kernel, attention_types(dtype), form.constants, form.options, folder)


def _assert_fits(built: Compiled) -> None:
    assert (built.stack_bytes, built.local_bytes) == (0, 0), "registers are spilled"
    assert built.shared_bytes <= SHARED_BYTES
    assert built.registers * 32 * built.num_warps <= REGISTERS


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


@pytest.mark.parametrize(("shape", "mode", "deterministic"), CASES, ids=map(_name, CASES))
def test_attention_compiles_to_matrix_instructions_and_fits(
    shape: AttentionShape, mode: Mode, deterministic: bool, tmp_path: Path, record_property: Any
) -> None:
    form = variant(shape, mode, deterministic)
    built = _compile_attention(form, shape.dtype, tmp_path)
    _assert_fits(built)
    whole_warpgroup = tile_for(shape, mode, deterministic).block_m >= 64
    products = {"wgmma": built.ptx.count("wgmma.mma_async"), "mma": built.ptx.count("mma.sync")}
    assert products["wgmma" if whole_warpgroup else "mma"] > 0, products
    copies = re.findall(r"cp\.async\.cg\.shared\.global[^;]*, 0x10,", built.ptx)
    assert len(copies) >= 4, "keys and values are not copied 16 bytes at a time"
    figures = {"registers": built.registers, "shared_bytes": built.shared_bytes, **products}
    for name, figure in figures.items():
        record_property(name, figure)
    print(_name((shape, mode, deterministic)), figures)


@pytest.mark.parametrize("size", [64, 128])
def test_combine_fits_and_prefetches(size: int, tmp_path: Path) -> None:
    form = combine_variant(AttentionShape(8, 4, size, 16, torch.bfloat16))
    built = compile_sm90(
        combine_kernel, attention_types(torch.bfloat16), form.constants, form.options, tmp_path
    )
    _assert_fits(built)
    assert built.ptx.count("cp.async.c") > form.constants["STAGES"], "partials are not loaded ahead"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_store_moves_16_bytes_a_thread(dtype: torch.dtype, tmp_path: Path) -> None:
    types = dict.fromkeys(("k", "v", "k_cache", "v_cache"), f"*{NAMES[dtype]}")
    types |= {"slot_mapping": "*i64", "stride_kt": "i32", "stride_vt": "i32"}
    built = compile_sm90(
        store_kv_kernel, types, store_constants(8, 128, 16), {"num_warps": STORE_WARPS}, tmp_path
    )
    _assert_fits(built)
    assert re.search(r"ld\.global\.v4\.b32", built.ptx)
    assert re.search(r"st\.global\.v4\.b32", built.ptx)


@pytest.mark.parametrize("size", [128, 4096, 5120])  # a head; hidden sizes of a power of two and not
def test_rms_norm_fits(size: int, tmp_path: Path) -> None:
    types = {**dict.fromkeys(("out", "x", "weight"), "*bf16"), "stride_token": "i32", "stride_head": "i32"}
    types |= {"num_heads": "i32", "eps": "fp32"}
    built = compile_sm90(
        rms_norm_kernel, types, rms_norm_constants(size), {"num_warps": rms_norm_warps(size)}, tmp_path
    )
    _assert_fits(built)
    assert re.search(r"ld\.global\.(v4\.b32|v2\.b32)", built.ptx), "values are loaded one by one"


@pytest.mark.parametrize(("heads", "size"), [(32, 128), (7, 80)])
def test_rotary_fits(heads: int, size: int, tmp_path: Path) -> None:
    types = {"heads": "*bf16", "table": "*fp32", "stride_token": "i32"}
    built = compile_sm90(
        rotary_kernel, types, rotary_constants(heads, size), {"num_warps": ROTARY_WARPS}, tmp_path
    )
    _assert_fits(built)
    assert re.search(r"ld\.global\.v4\.b32", built.ptx), "values are loaded one by one"


def test_a_spill_would_be_seen(tmp_path: Path) -> None:
    """The same kernel with too few registers: the figures above are read, not assumed."""
    shape = AttentionShape(8, 4, 128, 16, torch.bfloat16)
    form = variant(shape, Mode.PREFILL, False)
    starved = Variant(form.constants, {**form.options, "maxnreg": 96})
    assert _compile_attention(starved, shape.dtype, tmp_path).stack_bytes > 0


def test_float32_stays_out_of_the_matrix_units_which_would_round_it(tmp_path: Path) -> None:
    shape = AttentionShape(8, 4, 128, 16, torch.float32)
    built = _compile_attention(variant(shape, Mode.DECODE, False), shape.dtype, tmp_path)
    _assert_fits(built)
    assert "wgmma" not in built.ptx
    assert "mma.sync" not in built.ptx
