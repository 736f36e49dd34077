"""The byte ledger: what an engine takes on its device, and how many KV blocks fit.

Boundary: arithmetic on a model's shape and on what the device reports; it allocates nothing. When something does not fit,
the error says what takes the bytes and which settings would fit.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.errors import OutOfMemoryError
from engine.models.config import ModelConfig
from engine.plan import KVSpec
from engine.records import MemoryLedger

CPU_KV_BYTES = 1 << 30  # default KV cache on a CPU: this much,
CPU_KV_SHARE = 0.25  # or this share of the free memory if that is less
GPU_SHARE = 0.92  # of the GPU's free memory; the rest is for fragmentation and the allocator's rounding
GPU_FIXED_BYTES = 512 << 20  # kernels, library workspaces, captured graphs
LOGIT_COPIES = 4  # logits, log-softmax, noise and a sorted copy at once


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes of a device: all, and what can be taken now."""

    total_bytes: int
    free_bytes: int


def device_memory(device: torch.device) -> DeviceMemory:
    """What the device has. On a CPU the container's limit counts where there is one."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return DeviceMemory(total, free + reserved)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = _meminfo_bytes("MemAvailable") or total // 2
    limit, used = (_cgroup_bytes(name) for name in ("memory.max", "memory.current"))
    if limit is not None and limit < total:
        total, free = limit, min(free, max(0, limit - (used or 0)))
    return DeviceMemory(total, free)


def make_kv_spec(model: ModelConfig, block_size: int, dtype: torch.dtype) -> KVSpec:
    """The one KV group of a model: all layers share a block table; windows are masks within it."""
    windows = set(model.sliding_windows)
    return KVSpec(
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads,
        head_size=model.head_size,
        block_size=block_size,
        dtype_bytes=dtype.itemsize,
        sliding_window=windows.pop() if len(windows) == 1 else None,
    )


def workspace_bytes(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device
) -> int:
    """An upper estimate of what a step needs beside weights and KV cache."""
    assert config.max_batched_tokens is not None
    wide = max(dtype.itemsize, 4)
    heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_size
    per_token = (
        dtype.itemsize * (4 * model.hidden_size + 3 * model.intermediate_size + 2 * heads) + wide * heads
    )
    logits = LOGIT_COPIES * wide * model.vocab_size * max(config.max_num_seqs, 256)
    rows = config.max_num_seqs * (config.max_model_len or model.max_context) * 4
    fixed = GPU_FIXED_BYTES if device.type == "cuda" else 0
    return config.max_batched_tokens * per_token + logits + rows + fixed


def size_pool(
    config: EngineConfig, model: ModelConfig, kv_spec: KVSpec, dtype: torch.dtype, device: torch.device
) -> int:
    """The number of KV blocks: what the config says, checked against the device, or what the budget allows.

    Raises:
        OutOfMemoryError: weights, workspace and the KV cache do not fit together.
    """
    memory = device_memory(device)
    weights = model.num_parameters * dtype.itemsize
    workspace = workspace_bytes(config, model, dtype, device)
    left = memory.free_bytes - weights - workspace
    if config.num_blocks is not None:
        asked = config.num_blocks
    elif config.kv_memory_bytes is not None:
        asked = config.kv_memory_bytes // kv_spec.bytes_per_block
    else:
        budget = GPU_SHARE * left if device.type == "cuda" else min(CPU_KV_BYTES, CPU_KV_SHARE * left)
        longest = config.max_model_len or model.max_context
        most = config.max_num_seqs * -(-longest // config.block_size)  # more could never be used at once
        asked = min(int(budget) // kv_spec.bytes_per_block, most)
    if asked < 1 or asked * kv_spec.bytes_per_block > left:
        _raise_does_not_fit(asked, left, weights, workspace, memory, kv_spec, device)
    return asked


def check_length_fits(config: EngineConfig, kv_spec: KVSpec, num_blocks: int) -> None:
    """Check that one sequence of `max_model_len` fits the pool.

    Raises:
        OutOfMemoryError: with the settings that fit.
    """
    assert config.max_model_len is not None
    needed = -(-config.max_model_len // config.block_size)
    if needed <= num_blocks:
        return
    raise OutOfMemoryError(
        f"max_model_len {config.max_model_len} needs {needed} KV blocks ({_size(needed * kv_spec.bytes_per_block)}), "
        f"the pool has {num_blocks} ({_size(num_blocks * kv_spec.bytes_per_block)}, "
        f"{kv_spec.bytes_per_token} bytes a token)",
        value=config.max_model_len,
        limit=num_blocks * config.block_size,
        param="max_model_len",
        remedy=f"Set max_model_len={num_blocks * config.block_size} or less, or "
        f"kv_memory_bytes={needed * kv_spec.bytes_per_block} or more.",
    )


def make_ledger(
    config: EngineConfig, model: ModelConfig, kv_spec: KVSpec, dtype: torch.dtype, device: torch.device
) -> MemoryLedger:
    """The ledger of a resolved config."""
    assert config.num_blocks is not None
    return MemoryLedger(
        weights_bytes=model.num_parameters * dtype.itemsize,
        kv_bytes=config.num_blocks * kv_spec.bytes_per_block,
        workspace_bytes=workspace_bytes(config, model, dtype, device),
        total_bytes=device_memory(device).total_bytes,
        device=str(device),
    )


def _raise_does_not_fit(
    asked: int,
    left: int,
    weights: int,
    workspace: int,
    memory: DeviceMemory,
    kv_spec: KVSpec,
    device: torch.device,
) -> None:
    fitting = max(0, left) // kv_spec.bytes_per_block
    if fitting:
        remedy = f"Set num_blocks={fitting} or kv_memory_bytes={fitting * kv_spec.bytes_per_block} or less."
    else:
        remedy = "Use a smaller model or dtype, lower max_batched_tokens or max_num_seqs, or free memory on the device."
    raise OutOfMemoryError(
        f"the engine does not fit on {device}: weights {_size(weights)}, workspace {_size(workspace)}, KV cache "
        f"{_size(max(asked, 1) * kv_spec.bytes_per_block)} ({max(asked, 1)} blocks of {kv_spec.block_size} tokens), and "
        f"{_size(memory.free_bytes)} of {_size(memory.total_bytes)} are free",
        value=max(asked, 1) * kv_spec.bytes_per_block,
        limit=max(0, left),
        remedy=remedy,
        param="num_blocks",
    )


def _size(num_bytes: int) -> str:
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} GiB"


def _meminfo_bytes(key: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":")), None)


def _cgroup_bytes(name: str) -> int | None:
    try:
        text = (Path("/sys/fs/cgroup") / name).read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
