"""What tensor parallel asks of the settings beside it, before memory is touched.

Boundary: settings and devices. Whether a model can be split is ``engine.models.shard``'s.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.memory import DeviceMemory, kv_spec_of
from engine.model_folder import is_gguf
from engine.models.config import ModelConfig
from engine.parallel.ranks import Ranks
from engine.records import MemoryLedger

# Each with what it has to be beside several ranks, and why.
_WITHOUT = (
    ("quantization", None, "quantized products are not split"),
    ("enable_lora", False, "adapters are not split"),
    ("deterministic", False, "sums over ranks are not proven to have the same bits in every batch"),
)


def settle_for_ranks(config: EngineConfig, device: torch.device) -> EngineConfig:
    """`config` as several ranks can run it: on GPUs steps are not captured, which is not proven beside NCCL here.

    Raises:
        ConfigError: a setting that does not go with tensor parallel, or a machine with fewer GPUs than ranks.
    """
    size = config.tensor_parallel_size
    if size == 1:
        return config
    method = None if config.speculative_config is None else config.speculative_config.method
    given = [(name, getattr(config, name), off, why) for name, off, why in _WITHOUT]
    if method not in (None, "ngram"):
        given.append(("speculative_config", method, None, "draft models are not split"))
    for name, value, off, why in given:
        if value != off:
            raise ConfigError(
                f"{name}={value!r} does not go with tensor_parallel_size {size}: {why}", value=value, limit=off, param=name,
                remedy=f"Set {name}={off}, or tensor_parallel_size=1.",
            )  # fmt: skip
    if device.type == "cuda":
        _check_gpus(size, device)
        return replace(config, enforce_eager=True)
    if not (dist.is_available() and dist.is_gloo_available()):
        raise _no_way(size, f"this torch ({torch.__version__}) has no gloo", 1)
    return config


def check_files(folder: Path, size: int) -> None:
    """Refuse files of which no part can be read.

    Raises:
        ConfigError: a GGUF file.
    """
    if size > 1 and is_gguf(folder):
        raise _no_way(size, f"{folder.name} is a GGUF file, which is not split", 1)


def what_all_have(config: EngineConfig, model: ModelConfig, ranks: Ranks) -> EngineConfig:
    """A config sized for this rank's device as it fits on those of all ranks; each of them asks."""
    assert config.num_blocks is not None
    assert config.max_model_len is not None
    num_blocks = ranks.smallest(config.num_blocks)
    return replace(
        config, num_blocks=num_blocks, kv_memory_bytes=num_blocks * kv_spec_of(config, model).bytes_per_block,
        max_model_len=ranks.smallest(config.max_model_len),
    )  # fmt: skip


def device_of(rank: int, first: torch.device) -> torch.device:
    """A rank's device: the GPUs from rank 0's on, or the one CPU."""
    return torch.device("cuda", (first.index or 0) + rank) if first.type == "cuda" else first


def share_of_memory(memory: DeviceMemory, device: torch.device, size: int) -> DeviceMemory:
    """What one rank may take: on a CPU, which all ranks share, its part."""
    if device.type == "cuda":
        return memory
    return DeviceMemory(memory.total_bytes // size, memory.free_bytes // size)


def of_all_ranks(ledger: MemoryLedger, size: int) -> MemoryLedger:
    """A rank's ledger as its device's: on a CPU all ranks are on that one device, on GPUs the others' are alike."""
    if ledger.device != "cpu":
        return ledger
    parts = ("weights_bytes", "kv_bytes", "workspace_bytes", "host_tier_bytes")
    return replace(ledger, **{name: size * getattr(ledger, name) for name in parts})


def _check_gpus(size: int, first: torch.device) -> None:
    if not (dist.is_available() and dist.is_nccl_available()):
        raise _no_way(size, f"this torch ({torch.__version__}) has no NCCL", 1)
    count = torch.cuda.device_count() - (first.index or 0)
    if size > count:
        raise _no_way(size, f"there are {count} GPUs from {first} on", count)


def _no_way(size: int, why: str, limit: int) -> ConfigError:
    return ConfigError(
        f"tensor_parallel_size {size}: {why}", value=size, limit=limit, param="tensor_parallel_size",
        remedy=f"Set tensor_parallel_size={limit}" + (" or less." if limit > 1 else "."),
    )  # fmt: skip
