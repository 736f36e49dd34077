"""Makes bfloat16 right in Triton's interpreter, which keeps such values as their bits.

The interpreter multiplies bfloat16 bit patterns as integers in `tl.dot`, subtracts them as integers, and truncates where a
GPU rounds to nearest even. All three are replaced by what the hardware does. Only under TRITON_INTERPRET=1, that is in the process that
`test_interpreted.py` starts.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch


def _bfloat16_to_float32(bits: Any) -> Any:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _float32_to_bfloat16(values: Any) -> Any:
    rounded = torch.from_numpy(np.array(values)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16)


def _correct_bfloat16() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    plain_dot = interpreter.InterpreterBuilder.create_dot
    plain_subtract = interpreter.InterpreterBuilder.create_fsub
    plain_convert = interpreter._convert_float

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle(_bfloat16_to_float32(handle.data), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain_dot(self, widened(a), widened(b), *rest)

    def create_fsub(self: Any, a: Any, b: Any) -> Any:
        if a.dtype.scalar != tl.bfloat16:
            return plain_subtract(self, a, b)
        return interpreter.TensorHandle(_float32_to_bfloat16(widened(a).data - widened(b).data), tl.bfloat16)

    def convert(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            return _float32_to_bfloat16(values).reshape(values.shape)
        return plain_convert(values, source, target, rounding)

    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter.InterpreterBuilder.create_fsub = create_fsub
    interpreter._convert_float = convert


if os.environ.get("TRITON_INTERPRET") == "1":
    _correct_bfloat16()
