"""The MLP's gated activation, ``silu(gate) * up`` or with a gelu, over the merged projection: one launch, a piece of a row a
program.

Every value is computed from its own two inputs by the same instructions wherever it stands, so a row's bits do not
depend on its neighbours. Reference: `engine.models.layers.gated` in torch's operations.
Boundary: SiLU, and GELU by its tanh form; no bias, no quantized output.
"""

# Triton reads kernel parameters by name and compiles the body; their types exist only at launch.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SILU_BLOCK = 1024  # values of one program: 16 bytes of each input a thread
SILU_WARPS = 4


@triton.jit
def silu_and_mul_kernel(
    out, gate_up, stride_token, SIZE: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr
):  # fmt: skip
    """out [T, SIZE] from gate_up [T, 2 SIZE]: gates, then ups. Program (token, piece of BLOCK values)."""
    token = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < SIZE
    source = gate_up + token * stride_token + lane
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + SIZE, mask=inside, other=0.0).to(tl.float32)
    steep = gate
    if GELU:  # (1 + tanh(u)) / 2 is the sigmoid of 2 u
        steep = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    # exp overflows to infinity for gates far below zero, and the quotient is then the right one: zero.
    activated = gate / (1.0 + tl.exp(-steep))
    rounded = activated.to(gate_up.dtype.element_ty).to(tl.float32)  # as checkpoints were trained
    tl.store(out + token * SIZE + lane, (rounded * up).to(out.dtype.element_ty), mask=inside)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` for gate_up [T, 2 I], whose rows may have any stride -> [T, I], contiguous."""
    return _launch(gate_up, gelu=False)


def gelu_tanh_and_mul(gate_up: Tensor) -> Tensor:
    """The same with the gelu whose normal distribution is a tanh."""
    return _launch(gate_up, gelu=True)


def _launch(gate_up: Tensor, *, gelu: bool) -> Tensor:
    tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.shape[1] == 2 * size, gate_up.shape
    assert gate_up.stride(1) == 1, gate_up.stride()
    out = torch.empty(tokens, size, dtype=gate_up.dtype, device=gate_up.device)
    if tokens:
        silu_and_mul_kernel[(tokens, triton.cdiv(size, SILU_BLOCK))](
            out, gate_up, gate_up.stride(0), SIZE=size, BLOCK=SILU_BLOCK, GELU=gelu, num_warps=SILU_WARPS
        )
    return out
