"""Compiling a kernel for a GPU that is not here, and what the hardware would be given."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

# Compute capability -> the most shared memory that one program may take. Source: CUDA C++ Programming Guide, technical
# specifications per compute capability.
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
REGISTERS = 65536  # of one multiprocessor, on either
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class Compiled:
    capability: int
    ptx: str
    shared_bytes: int
    num_warps: int
    registers: int  # per thread
    stack_bytes: int  # where spilled registers live
    local_bytes: int

    def assert_fits(self, *, spilled_bytes: int = 0) -> None:
        assert self.stack_bytes <= spilled_bytes, f"{self.stack_bytes} bytes of registers are spilled"
        assert self.local_bytes == 0
        assert self.shared_bytes <= SHARED_BYTES[self.capability]
        assert self.registers * 32 * self.num_warps <= REGISTERS


@pytest.fixture
def compile_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Compiled]:
    """``compile_kernel(capability, kernel, types, constants, options)``; skips where nothing can be compiled."""
    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set: kernels cannot be compiled")
    if not CUOBJDUMP.exists():
        pytest.skip(f"this Triton brings no {CUOBJDUMP.name}")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))

    def compile_for(
        capability: int,
        kernel: Any,
        types: Mapping[str, str],
        constants: Mapping[str, int],
        options: Mapping[str, int],
    ) -> Compiled:
        built = _build(capability, kernel, types, constants, options)
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(built.asm["cubin"])
        usage = subprocess.run(
            [str(CUOBJDUMP), "--dump-resource-usage", str(cubin)], capture_output=True, text=True, check=True
        ).stdout
        found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
        return Compiled(
            capability,
            built.asm["ptx"],
            built.metadata.shared,
            built.metadata.num_warps,
            found["REG"],
            found["STACK"],
            found["LOCAL"],
        )

    return compile_for


def _build(
    capability: int, kernel: Any, types: Mapping[str, str], constants: Mapping[str, int], options: Mapping[str, int]
) -> Any:  # fmt: skip
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
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(options))


class NoDevice:
    """What Triton asks of a driver before a launch."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class Launch(NamedTuple):
    """One launch that did not run: the kernel's name, the hash of what was compiled for it, and its grid."""

    kernel: str
    digest: str
    grid: tuple[int, ...]


@pytest.fixture
def launches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Every launch of the test, none of which runs."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compile_and_launch = JITFunction.run
    seen: list[Launch] = []

    def only_compile(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        built = compile_and_launch(self, *args, grid=grid, warmup=True, **options)
        seen.append(Launch(self.__name__, built.hash, grid))
        return built

    monkeypatch.setattr(JITFunction, "run", only_compile)
    monkeypatch.setattr(driver, "_active", NoDevice())
    return seen
