"""Compiles the sampling kernels for sm_80 and sm_90, without a GPU: nothing is spilled, and a multiprocessor holds them.

Also the launches themselves, on a stand-in for Triton's driver: how many there are, and that no step compiles again.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine.kernels.logit_controls import (
    BLOCK,
    PREFIX,
    ban_kernel,
    bias_kernel,
    change_kernel,
    control_logits,
    count_kernel,
)
from engine.kernels.logit_controls import WARPS as CONTROL_WARPS
from engine.kernels.logprobs import (
    MERGE_WARPS,
    PART_WARPS,
    merge_figures_kernel,
    part_kernel,
    token_logprobs,
)
from engine.kernels.random_sampling import FILTERED, PLAIN, TYPICAL, sampling_step
from engine.kernels.sampling import WARPS, draw_kernel, merge_kernel, sample_tokens
from engine.kernels.sampling_filters import NUM_DIGITS, TILE, narrow_kernel, typical_kernel
from engine.runner.controls import Controls
from engine.runner.device_controls import DeviceControls
from engine.sampling_params import MAX_BAD_WORD_TOKENS

REGISTERS = 65536  # of one multiprocessor
SHARED_BYTES = 16 * 1024  # so that the registers, not these, say how many programs run side by side
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
PARTS = 128  # of a vocabulary of 128k
FLOATS = (
    "logits",
    "temperature",
    "top_p",
    "min_p",
    "typical_p",
    "best",
    "peaks",
    "totals",
    "chosen",
    "top_values",
)
CONTROL_FLOATS = ("repetition", "frequency", "presence", "biases")
CONTROL_INTS = (
    "marked", "tokens", "counts_tokens", "allowed", "is_limited", "bias_ids", "num_biases", "bans", "num_bans", "num_prompt",
)  # fmt: skip
CONTROL_STRIDES = ("marks", "tokens", "out", "allowed", "biases", "row", "ban")
TYPES = {
    **dict.fromkeys((*FLOATS, *CONTROL_FLOATS), "*fp32"),
    **dict.fromkeys(CONTROL_INTS, "*i32"),
    "marks": "*i16",
    **dict.fromkeys((f"stride_{name}" for name in CONTROL_STRIDES), "i32"),
    **dict.fromkeys(
        (
            "counts",
            "rows",
            "positions",
            "top_k",
            "seed_low",
            "seed_high",
            "mask",
            "best_id",
            "out",
            "above",
            "token_ids",
        ),
        "*i32",
    ),
    **dict.fromkeys(("work", "typical", "rank", "top_ids"), "*i64"),
    **dict.fromkeys(("vocab", "stride_logits", "stride_mask", "index", "num_parts"), "i32"),
}

pytestmark = [
    pytest.mark.skipif(
        triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: kernels cannot be compiled"
    ),
    pytest.mark.skipif(not CUOBJDUMP.exists(), reason=f"this Triton brings no {CUOBJDUMP.name}"),
]


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))


def compiled(
    kernel: Any, constants: Mapping[str, Any], num_warps: int, arch: int, folder: Path, **types: str
) -> tuple[str, dict[str, int]]:
    """PTX and use of resources, compiled as a launch would whose pointers and sizes are multiples of 16."""
    given = TYPES | types
    signature = {name: "constexpr" if name in constants else given[name] for name in kernel.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if name not in constants and not kernel.params[index].do_not_specialize
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=dict(constants), attrs=aligned)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": num_warps})
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(built.asm["cubin"])
    usage = subprocess.run(
        [str(CUOBJDUMP), "--dump-resource-usage", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return built.asm["ptx"], found | {"SHARED": built.metadata.shared}


FORMS = {
    f"narrow-{'top_p' if by_mass else 'top_k'}-{'first' if first else 'next'}": (
        narrow_kernel, {"FIRST": first, "BY_MASS": by_mass, "HAS_MASK": True, "TILE": TILE}, WARPS, {},
    )
    for by_mass in (False, True)
    for first in (False, True)
} | {
    f"typical-{'first' if first else 'next'}": (
        typical_kernel, {"FIRST": first, "HAS_MASK": True, "TILE": TILE, "PARTS": PARTS}, WARPS, {},
    )
    for first in (False, True)
} | {
    f"draw-{('all', 'filtered', 'typical')[kind]}-{'masked' if masked else 'free'}": (
        draw_kernel,
        {"IS_FILTERED": kind > 0, "IS_TYPICAL": kind > 1, "HAS_MASK": masked, "TILE": TILE, "PARTS": PARTS}, WARPS, {},
    )
    for kind in range(3)
    for masked in (False, True)
} | {
    "controls-count": (count_kernel, {}, 1, {}),
    "controls-change": (change_kernel, {"TILE": TILE}, CONTROL_WARPS, {"out": "*fp32"}),
    "controls-bias": (bias_kernel, {"BLOCK": BLOCK}, CONTROL_WARPS, {"out": "*fp32"}),
    "controls-ban": (
        ban_kernel, {"BLOCK": BLOCK, "WORDS": PREFIX + MAX_BAD_WORD_TOKENS - 1}, CONTROL_WARPS, {"out": "*fp32"},
    ),
    "merge": (merge_kernel, {"PARTS": PARTS}, 1, {}),
    "logprobs-part": (part_kernel, {"NUM_TOP": 20, "TILE": TILE}, PART_WARPS, {"best": "*i64"}),
    "logprobs-merge": (
        merge_figures_kernel, {"NUM_TOP": 20, "TOP_PAD": 32, "PARTS": PARTS}, MERGE_WARPS, {"best": "*i64"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("arch", [pytest.param(80, marks=pytest.mark.full), 90])
@pytest.mark.parametrize("name", FORMS)
def test_fits(name: str, arch: int, tmp_path: Path, record_property: Any) -> None:
    kernel, constants, num_warps, types = FORMS[name]
    ptx, usage = compiled(kernel, constants, num_warps, arch, tmp_path, **types)
    assert (usage["STACK"], usage["LOCAL"]) == (0, 0), "registers are spilled"
    assert usage["SHARED"] <= SHARED_BYTES
    assert usage["REG"] * 32 * num_warps * 4 <= REGISTERS, "fewer than four programs on a multiprocessor"
    if kernel in (narrow_kernel, typical_kernel, draw_kernel, part_kernel, change_kernel):
        assert re.search(r"ld\.global\.v4\.b32", ptx), "logits are loaded one by one"
    if kernel is draw_kernel:
        assert "lg2.approx" not in ptx, "a logarithm of 22 bits would change which token wins"
    for figure, value in usage.items():
        record_property(figure, value)
    print(name, arch, usage)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here: tests/gpu launches for real")
def test_launches_depend_on_shapes_alone_and_compile_once(launches: list[Any]) -> None:
    runs = []
    for kinds, num_rows in ((PLAIN, 6), (FILTERED[:3] + TYPICAL[:3], 6), (TYPICAL, 1), (PLAIN, 5)):
        step = sampling_step(kinds, 4096, num_rows=num_rows + 1).part(slice(1, None))  # rows lie 4 bytes off
        sample_tokens(
            step.logits,
            step.rows,
            step.positions,
            step.settings,
            torch.empty_like(step.rows),
            is_filtered=True,
            is_typical=True,
        )
        token_logprobs(step.logits, step.rows, 5)
        runs.append(list(launches))
        launches.clear()
    assert runs[0] == runs[1]
    names = Counter(name for name, _, _ in runs[0])
    assert names == {
        "narrow_kernel": 2 * NUM_DIGITS + 1, "typical_kernel": NUM_DIGITS + 1, "draw_kernel": 1, "merge_kernel": 1, "part_kernel": 1,
        "merge_figures_kernel": 1,
    }  # fmt: skip
    assert [digest for _, digest, _ in runs[0]] == [digest for _, digest, _ in runs[2]]
    assert [digest for _, digest, _ in runs[0]] == [digest for _, digest, _ in runs[3]]
    assert len({digest for name, digest, _ in runs[0] if name == "narrow_kernel"}) == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here: tests/gpu launches for real")
def test_controls_are_four_launches_whatever_rows_ask_for(launches: list[Any]) -> None:
    vocab, runs = 4096, []
    for asked, first in (
        (Controls(0), 0),
        (Controls(1, 1.2, biases={3: 1.0}, allowed=(3,)), 0),
        (Controls(0), 1),
    ):
        controls = DeviceControls(9, vocab, torch.device("cpu"))
        controls.put(1, [torch.from_numpy(part) for part in controls.parts(asked, [2])])
        step = sampling_step(PLAIN, vocab, num_rows=8).part(slice(first, None))
        tokens = torch.zeros(9, 31, dtype=torch.int32)
        control_logits(step.logits, step.rows, step.positions, tokens, controls.tables)
        runs.append(list(launches))
        launches.clear()
    assert [name for name, _, _ in runs[0]] == ["count_kernel", "change_kernel", "bias_kernel", "ban_kernel"]
    assert runs[0] == runs[1]
    assert [digest for _, digest, _ in runs[0]] == [digest for _, digest, _ in runs[2]], "compiled anew"
