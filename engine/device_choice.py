"""Which device, compute dtype and number of threads an engine takes where its config leaves that open.

Boundary: readings of this machine; what depends on the model is ``engine.build``'s.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.errors import ConfigError


def resolve_device(config: EngineConfig) -> EngineConfig:
    """`config` with device, dtype and threads resolved: all that does not depend on the model. On a CPU torch takes the threads."""
    device = choose_device(config.device)
    threads = config.num_threads or available_cores()
    return replace(config, device=str(device), dtype=choose_dtype(config.dtype, device), num_threads=threads)


def choose_device(name: str) -> torch.device:
    """The device of that name, the first GPU for "auto" where there is one. Raises ConfigError: it is not there."""
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            f"unknown device {name!r}", value=name, limit="cpu, cuda, cuda:N", param="device"
        ) from error
    if device.type == "cpu":
        return device
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if (device.index or 0) >= count:
        raise ConfigError(
            f"device {name!r} is not there",
            value=name,
            limit=f"{count} CUDA devices",
            param="device",
            remedy='Use device="cpu" or "auto".',
        )
    return torch.device("cuda", device.index or 0)


def choose_dtype(name: str, device: torch.device) -> str:
    """The compute dtype: for "auto" the narrowest that the device multiplies natively."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    return "bfloat16" if cpu_multiplies_bfloat16() else "float32"


def cpu_multiplies_bfloat16() -> bool:
    """Whether the CPU has bfloat16 products of its own (AVX512-BF16 or AMX); elsewhere float32 is faster."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if capabilities:
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    flags = Path("/proc/cpuinfo")
    text = flags.read_text(encoding="ascii", errors="replace") if flags.is_file() else ""
    return "avx512_bf16" in text or "amx_bf16" in text


def available_cores() -> int:
    """CPU cores that this process may keep busy: those it is bound to, within its container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    path = Path("/sys/fs/cgroup/cpu.max")
    quota, _, period = (
        path.read_text(encoding="ascii").strip().partition(" ") if path.is_file() else ("max", "", "")
    )
    if quota.isdigit() and period.isdigit():
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores
