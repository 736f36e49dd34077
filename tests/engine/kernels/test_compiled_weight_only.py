"""Compiles the weight-only products for sm_80 and sm_90, without a GPU, and reads what the hardware would be given.

Proves: matrix units are used (wgmma on sm_90 where there are many tokens, mma.sync elsewhere), weights arrive 16 bytes at
a time, nothing is spilled, shared memory and registers fit one multiprocessor, and no launch is compiled again because the
number of tokens changed. Does not prove speed.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine.kernels.quantized_weight import quantize_int4, quantize_int8
from engine.kernels.weight_only import (
    FEW_TOKENS,
    few_tokens_kernel,
    many_tokens_kernel,
    plan_launch,
    weight_only_linear,
)

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}  # the most that one program may take
REGISTERS = 65536  # of one multiprocessor
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}

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
    spilled_bytes: int


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))


def compile_product(
    capability: int, bits: int, tokens: int, dtype: torch.dtype, folder: Path, **options: int
) -> Compiled:
    """Compile as a launch at an 8B model's shape would, whose sizes, strides and pointers are multiples of 16."""
    launch = plan_launch(bits, tokens, 4096, 4096, has_bias=True, deterministic=False)
    kernel: Any = few_tokens_kernel if launch.few else many_tokens_kernel
    value, small = f"*{NAMES[dtype]}", {4: ("*i8", "*bf16", "*u8"), 8: ("*i8", "*fp32", "*fp32")}[bits]
    types = {"out": value, "x": value, "bias": value, "num_tokens": "i32"}
    types |= dict(zip(("values", "scales", "zeros"), small, strict=True))
    types |= dict.fromkeys(("out_features", "in_features", "stride_x", "stride_out"), "i32")
    signature = {name: "constexpr" if name in launch.constants else types[name] for name in kernel.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if name not in launch.constants and name != "num_tokens"
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=dict(launch.constants), attrs=aligned)
    built = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={**launch.options, **options}
    )
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(built.asm["cubin"])
    usage = subprocess.run(
        [str(CUOBJDUMP), "--dump-resource-usage", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    spilled = found["STACK"] + found["LOCAL"]
    return Compiled(built.asm["ptx"], built.metadata.shared, built.metadata.num_warps, found["REG"], spilled)


BF16 = [
    pytest.param(capability, bits, tokens, torch.bfloat16, marks=pytest.mark.full if capability == 80 else ())
    for capability in (80, 90)
    for bits in (8, 4)
    for tokens in (1, 40, 1000)
]
FP16 = [(90, bits, tokens, torch.float16) for bits in (8, 4) for tokens in (1, 1000)]


@pytest.mark.parametrize(("capability", "bits", "tokens", "dtype"), BF16 + FP16)
def test_products_use_the_matrix_units_and_fit(
    capability: int, bits: int, tokens: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    built = compile_product(capability, bits, tokens, dtype, tmp_path)
    assert built.spilled_bytes == 0
    assert built.shared_bytes <= SHARED_BYTES[capability]
    assert built.registers * 32 * built.num_warps <= REGISTERS
    many = tokens > FEW_TOKENS
    products = "wgmma.mma_async" if capability == 90 and many else "mma.sync"
    assert built.ptx.count(products) > 0
    copied = set(re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*, (0x\w+),", built.ptx))
    assert copied <= {"0x8", "0x10"} if many else copied == {"0x10"}, (
        "tiles are not copied 16 bytes at a time"
    )


def test_a_spill_would_be_seen(tmp_path: Path) -> None:
    """The same kernel with too few registers: the figures above are read, not assumed."""
    assert compile_product(90, 4, 1000, torch.bfloat16, tmp_path, maxnreg=64).spilled_bytes > 0


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_are_not_converted_one_by_one(bits: int, tmp_path: Path) -> None:
    """An unpacked conversion a weight would take longer than reading it: the device does few of those at once."""
    compile_product(90, bits, 1, torch.bfloat16, tmp_path)
    code = subprocess.run(
        [str(CUOBJDUMP), "-sass", str(tmp_path / "kernel.cubin")], capture_output=True, text=True, check=True
    ).stdout
    assert code.count("HADD2.BF16_V2") >= 64, "no two weights are converted at once"
    assert code.count("I2F") <= 16


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here: tests/gpu launches for real")
@pytest.mark.parametrize("quantize", [quantize_int8, quantize_int4])
def test_launches_compile_once_for_any_number_of_tokens_in_their_range(
    quantize: Any, launches: list[Any]
) -> None:
    weight = quantize(torch.randn(64, 256))
    for tokens in (1, 2, 15, 16, 17, 48, 64, 65, 128, 1000):
        weight_only_linear(torch.zeros(tokens, 256, dtype=torch.bfloat16), weight)
    forms = {name: len({digest for other, digest, _ in launches if other == name}) for name, *_ in launches}
    assert forms == {"few_tokens_kernel": 1, "many_tokens_kernel": 2}
    assert len(launches) == 10
