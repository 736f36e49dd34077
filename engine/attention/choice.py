"""Which attention backend a config gets on a device.

Boundary: the name. ``engine.build.make_attention`` makes the backend; backends are imported only where they are asked about.
"""

from __future__ import annotations

import torch

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.models.config import ModelConfig


def resolve_attention(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device
) -> str:
    """The backend that a config asks for, or the best one of this device.

    Raises:
        ConfigError: it does not run there.
    """
    name = config.attention_backend
    wrong = (name == "triton" and device.type != "cuda") or (name == "cpu" and device.type != "cpu")
    if wrong:
        raise ConfigError(
            f"attention_backend {name!r} does not run on {device}",
            value=name,
            limit="auto, reference",
            param="attention_backend",
        )
    if name == "auto":
        return _best_attention(model, dtype, device)
    if name == "triton":
        _check_triton(dtype, model.head_size)
    if name == "cpu":
        reason = _cpu_kernel_missing(dtype)
        if reason is not None:
            raise ConfigError(
                f"the compiled CPU attention kernel is not available: {reason}",
                value=name,
                limit="auto, reference",
                param="attention_backend",
                remedy='Use attention_backend="reference", or install g++.',
            )
    return name


def _best_attention(model: ModelConfig, dtype: torch.dtype, device: torch.device) -> str:
    if device.type == "cuda":
        try:
            _check_triton(dtype, model.head_size)
        except (ConfigError, ImportError):
            return "reference"
        return "triton"
    return "cpu" if _cpu_kernel_missing(dtype) is None else "reference"


def _check_triton(dtype: torch.dtype, head_size: int) -> None:
    from engine.attention.triton_paged import TritonPagedAttention

    TritonPagedAttention.check_supported(dtype, head_size)


def _cpu_kernel_missing(dtype: torch.dtype) -> str | None:
    """Why the compiled attention kernel cannot serve this dtype here; None where it can."""
    from engine.attention.cpu import COMPILED_DTYPES
    from engine.kernels.cpu_library import unavailable_reason

    return unavailable_reason() if dtype in COMPILED_DTYPES else f"it has no {dtype} form"
