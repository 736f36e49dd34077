"""Compiles what scores and caches may be besides the plain form, for sm_80 and sm_90: soft cap, ALiBi, fp8 and int8 caches.

Proves: matrix units are used, registers and shared memory fit, a quantized cache is read by 16-byte asynchronous copies.
Does not prove speed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from engine.kernels.attention_tiles import AttentionShape, Mode, tile_for, variant
from engine.kernels.kv_quantization import QUANTIZED_DTYPES
from engine.kernels.paged_attention import paged_attention_kernel
from engine.kernels.rotary import (
    rotate_and_store_constants,
    rotate_and_store_kernel,
    rotate_and_store_warps,
)
from engine.kernels.store_quantized_kv import (
    STORE_OPTIONS,
    store_quantized_constants,
    store_quantized_kv_kernel,
)

FORMS: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 50.0},
    "alibi": {"alibi": True},
    "fp8": {"cache_dtype": torch.float8_e4m3fn},
    "int8": {"cache_dtype": torch.int8},
}
MODES = [(mode, deterministic) for mode in (Mode.DECODE, Mode.PREFILL) for deterministic in (False, True)]
# On sm_80, whose products take their operands from registers, prefill at heads of 128 is short of a few of them.
SM80_SPILLED_BYTES = 192

both_targets = pytest.mark.parametrize("capability", [80, 90])


def _types(shape: AttentionShape) -> dict[str, str]:
    types = dict.fromkeys(("out", "q"), "*bf16")
    types |= dict.fromkeys(("k_cache", "v_cache"), "*i8" if shape.cache_dtype else "*bf16")
    types |= dict.fromkeys(("block_tables", "seq_lens", "query_start"), "*i32")
    types |= dict.fromkeys(("part_acc", "part_peak", "part_total"), "*fp32")
    types |= dict.fromkeys(("alibi_slopes", "k_scale", "v_scale"), "*fp32")
    types |= dict.fromkeys(("stride_qt", "stride_ot", "stride_table", "first_row", "num_rows"), "i32")
    return {**types, "scale_log2": "fp32"}


@pytest.mark.full
@both_targets
@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize(
    ("mode", "deterministic"), MODES, ids=[f"{m.value}{'-deterministic' * d}" for m, d in MODES]
)
def test_every_form_compiles_to_matrix_instructions_and_fits(
    capability: int, form: str, mode: Mode, deterministic: bool, compile_kernel: Callable[..., Any]
) -> None:
    shape = AttentionShape(8, 4, 128, 16, torch.bfloat16, **FORMS[form])
    chosen = variant(shape, mode, deterministic)
    built = compile_kernel(
        capability, paged_attention_kernel, _types(shape), chosen.constants, chosen.options
    )
    tight = capability == 80 and mode is Mode.PREFILL
    built.assert_fits(spilled_bytes=SM80_SPILLED_BYTES if tight else 0)
    whole_warpgroup = tile_for(shape, mode, deterministic).block_m >= 64
    product = "wgmma.mma_async" if capability == 90 and whole_warpgroup else "mma.sync"
    assert product in built.ptx
    copies = re.findall(r"cp\.async\.cg\.shared\.global[^;]*, 0x10,", built.ptx)
    assert len(copies) >= 4, "keys and values are not copied 16 bytes at a time"


@both_targets
@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.int8], ids=["fp8", "int8"])
def test_a_quantizing_store_fits(
    capability: int, cache_dtype: torch.dtype, compile_kernel: Callable[..., Any]
) -> None:
    types = {**dict.fromkeys(("k", "v"), "*bf16"), **dict.fromkeys(("k_cache", "v_cache"), "*i8")}
    types |= {**dict.fromkeys(("k_scale", "v_scale"), "*fp32"), "slot_mapping": "*i64"}
    types |= {"stride_kt": "i32", "stride_vt": "i32"}
    constants = store_quantized_constants(8, 128, 16, cache_dtype)
    built = compile_kernel(capability, store_quantized_kv_kernel, types, constants, STORE_OPTIONS)
    _assert_stores(built)


# Heads of Llama 8B and Qwen3 0.6B.
@both_targets
@pytest.mark.parametrize(
    ("cache_dtype", "heads", "norm"),
    [(torch.float8_e4m3fn, 32, False), (torch.int8, 16, True)],
    ids=["fp8", "int8"],
)
def test_a_quantizing_rotation_fits(
    capability: int, cache_dtype: torch.dtype, heads: int, norm: bool, compile_kernel: Callable[..., Any]
) -> None:
    types = dict.fromkeys(("qkv", "q_weight", "k_weight"), "*bf16")
    types |= {
        **dict.fromkeys(("k_cache", "v_cache"), "*i8"),
        **dict.fromkeys(("positions", "slot_mapping"), "*i64"),
    }
    types |= {**dict.fromkeys(("table", "k_scale", "v_scale"), "*fp32"), "stride_token": "i32", "eps": "fp32"}
    constants = rotate_and_store_constants(heads, 8, 128, 16, norm=norm)
    options = {"num_warps": rotate_and_store_warps(constants), "enable_fp_fusion": False}
    constants["CACHE"] = QUANTIZED_DTYPES[cache_dtype]
    _assert_stores(compile_kernel(capability, rotate_and_store_kernel, types, constants, options))


def _assert_stores(built: Any) -> None:
    """Also for a device without fp8: what is rounded, is by integer arithmetic."""
    built.assert_fits()
    assert "e4m3" not in built.ptx
    assert re.search(r"ld\.global\.v4\.b32", built.ptx), "values are loaded one by one"
    assert re.search(r"st\.global\.v[24]\.b32", built.ptx), "values are stored one by one"
