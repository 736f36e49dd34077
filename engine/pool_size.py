"""How many KV blocks fit beside weights and workspace, and which settings would fit where they do not.

A config that does not fit is refused with what takes the bytes, and with every setting that alone makes it fit: its largest
value that is accepted, found by trying values, so that the advice and the check cannot differ.

Boundary: arithmetic on one model and one reading of its device; nothing is allocated. What takes how many bytes is
``engine.memory``'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from engine.config import EngineConfig
from engine.errors import ConfigError, OutOfMemoryError
from engine.kernels.kv_quantization import SETTINGS
from engine.memory import (
    Demand,
    DeviceMemory,
    estimate_demand,
    in_units,
    kv_specs,
    torch_dtype,
    workspace_bytes,
)
from engine.models.config import ModelConfig
from engine.models.draft import Draft, max_context
from engine.plan import KVSpec

CPU_KV_BYTES = 1 << 30  # default KV cache on a CPU: this much,
CPU_KV_SHARE = 0.25  # or this share of what is left if that is less
# Of what a GPU has left by estimate; the rest is for fragmentation and the allocator's rounding.
GPU_SHARE = 0.92
# Of what it has left once the largest step and its graphs were measured. The rest is for what no reading tells: the driver's
# own part of each graph, partial results that attention reserves as the pool grows, and fragmentation.
GPU_MEASURED_SHARE = 0.96
REMEDY_SHARE = 0.99  # of the free memory, for advice: other processes move between a refusal and the next try
NARROWER = {"float64": ("float32", "bfloat16"), "float32": ("bfloat16",)}
NARROWER_KV = ("int8", "fp8")  # the more accurate first


@dataclass(frozen=True, slots=True)
class Measured:
    """What a loaded engine of `config` takes: counted weights, workspace and graphs of a profile run."""

    config: EngineConfig
    demand: Demand


@dataclass(frozen=True, slots=True)
class Remedy:
    """One setting that makes a config fit when nothing else is changed."""

    setting: str
    value: int | str
    direction: str = "or less"

    def __str__(self) -> str:
        value = repr(self.value) if isinstance(self.value, str) else f"{self.value} {self.direction}"
        return f"{self.setting}={value}"


@dataclass(frozen=True, slots=True)
class _Fit:
    """A config on the scales."""

    demand: Demand
    left: int  # bytes for the KV cache
    block_bytes: int
    host_tier_bytes: int  # of the same memory: 0 beside a GPU
    num_blocks: int  # asked for, or what the budget gives
    needed: int  # blocks that one sequence of max_model_len takes; 1 where that follows the pool

    @property
    def pool_fits(self) -> bool:
        return self.num_blocks >= 1 and self.num_blocks * self.block_bytes <= self.left

    @property
    def context_fits(self) -> bool:
        return self.needed <= self.num_blocks


class PoolSizer:
    """Weighs configs of one model on one device. `memory`: the device before the weights are loaded.

    `measured`: what was found out by loading; None: everything is estimated. `draft`: the model that guesses beside it.
    """

    def __init__(
        self,
        model: ModelConfig,
        device: torch.device,
        memory: DeviceMemory,
        measured: Measured | None = None,
        draft: Draft | None = None,
    ) -> None:
        self._model = model
        self._device = device
        self._memory = memory
        self._measured = measured
        self._draft = draft
        self._max_context = max_context(model, draft)

    def resolve(self, config: EngineConfig, *, may_clip: bool = False) -> EngineConfig:
        """`config` with `num_blocks`, `kv_memory_bytes` and `max_model_len` set. Its dtype and token budget are resolved.

        `may_clip`: a `max_model_len` that the pool cannot hold was no one's wish, and is lowered.

        Raises:
            ConfigError: `max_model_len` is beyond the model's context.
            OutOfMemoryError: weights, workspace and KV cache do not fit, or the pool cannot hold one sequence.
        """
        most = self._max_context
        if config.max_model_len is not None and config.max_model_len > most:
            raise ConfigError(
                f"max_model_len {config.max_model_len} is more than the model's context of {most}",
                value=config.max_model_len,
                limit=most,
                param="max_model_len",
                remedy=f"Set max_model_len={most} or less.",
            )
        fit = self._weigh(config, self._memory.free_bytes)
        if not fit.pool_fits:
            raise self._pool_error(config, fit)
        if not fit.context_fits and not may_clip:
            raise self._context_error(config, fit)
        return replace(
            config,
            num_blocks=fit.num_blocks,
            kv_memory_bytes=fit.num_blocks * fit.block_bytes,
            max_model_len=min(config.max_model_len or most, fit.num_blocks * config.block_size),
        )

    def remedies(self, config: EngineConfig) -> list[Remedy]:
        """Every setting that alone makes `config` fit, each at its largest value that does; the pool's first."""
        return [*self._pool_remedies(config), *self._setting_remedies(config)]

    def _weigh(self, config: EngineConfig, free_bytes: int) -> _Fit:
        demand = self._demand(config)
        specs = kv_specs(config, self._model, self._draft)
        block_bytes = sum(spec.bytes_per_block for spec in specs)
        scale_bytes = sum(spec.shared_scale_bytes for spec in specs)
        host_tier_bytes = config.swap_space_bytes if self._device.type == "cpu" else 0
        left = free_bytes - demand.num_bytes - scale_bytes - host_tier_bytes
        needed = 1 if config.max_model_len is None else -(-config.max_model_len // config.block_size)
        num_blocks = self._num_blocks(config, left, block_bytes)
        return _Fit(demand, left, block_bytes, host_tier_bytes, num_blocks, needed)

    def _num_blocks(self, config: EngineConfig, left: int, block_bytes: int) -> int:
        if config.num_blocks is not None:
            return config.num_blocks
        if config.kv_memory_bytes is not None:
            return config.kv_memory_bytes // block_bytes
        share = GPU_SHARE if self._measured is None else GPU_MEASURED_SHARE
        budget = share * left if self._device.type == "cuda" else min(CPU_KV_BYTES, CPU_KV_SHARE * left)
        longest = config.max_model_len or self._max_context
        most = config.max_num_seqs * -(-longest // config.block_size)  # more could never be used at once
        return min(int(budget) // block_bytes, most)

    def _demand(self, config: EngineConfig) -> Demand:
        """What was measured, for the settings that it was measured with; else the estimate, raised by what it was short."""
        estimate = estimate_demand(config, self._model, torch_dtype(config), self._device, self._draft)
        if self._measured is None:
            return estimate
        known, demand = self._measured.config, self._measured.demand
        if all(
            getattr(config, name) == getattr(known, name)
            for name in ("dtype", "max_num_seqs", "max_batched_tokens", "max_model_len", "max_loras")
        ):
            return demand
        taken = demand.workspace_bytes + demand.graphs_bytes
        short = taken - workspace_bytes(known, self._model, torch_dtype(known), self._device)
        return replace(estimate, workspace_bytes=estimate.workspace_bytes + max(0, short))

    def _fits_with(self, config: EngineConfig, setting: str, value: Any) -> bool:
        changed = replace(config, **{setting: value})
        fit = self._weigh(changed, int(REMEDY_SHARE * self._memory.free_bytes))
        return fit.pool_fits and fit.context_fits

    def _pool_remedies(self, config: EngineConfig) -> Iterator[Remedy]:
        """A smaller pool where it takes too much, a larger one where it cannot hold one sequence."""
        fit = self._weigh(config, self._memory.free_bytes)
        in_bytes = config.num_blocks is None and config.kv_memory_bytes is not None
        setting, unit = ("kv_memory_bytes", fit.block_bytes) if in_bytes else ("num_blocks", 1)

        def fits(num_blocks: int) -> bool:
            return self._fits_with(config, setting, num_blocks * unit)

        if not fit.pool_fits:
            value = _largest(fits, fit.needed, fit.num_blocks)
            if value is not None:
                yield Remedy(setting, value * unit)
        elif fits(fit.needed):
            yield Remedy(setting, fit.needed * unit, "or more")

    def _setting_remedies(self, config: EngineConfig) -> Iterator[Remedy]:
        assert config.max_batched_tokens is not None
        for setting, low, now in (
            ("max_model_len", config.block_size, config.max_model_len or self._max_context),
            ("max_num_seqs", 1, config.max_num_seqs),
            ("max_batched_tokens", config.block_size, config.max_batched_tokens),
            *([("max_loras", 1, config.max_loras)] if config.enable_lora else []),
        ):
            value = _largest(partial(self._fits_with, config, setting), low, now)
            if value is not None:
                yield Remedy(setting, value)
        yield from self._host_tier_remedies(config)
        for dtype in NARROWER.get(config.dtype, ()):
            if self._fits_with(config, "dtype", dtype):
                yield Remedy("dtype", dtype)
                break
        for setting in self._narrower_caches(config):
            if self._fits_with(config, "kv_cache_dtype", setting):
                yield Remedy("kv_cache_dtype", setting)
                break

    def _narrower_caches(self, config: EngineConfig) -> tuple[str, ...]:
        if config.kv_cache_dtype in SETTINGS:
            return ()
        has_bfloat16 = self._device.type == "cpu" and config.kv_cache_dtype == "float32"
        return ("bfloat16", *NARROWER_KV) if has_bfloat16 else NARROWER_KV

    def _host_tier_remedies(self, config: EngineConfig) -> Iterator[Remedy]:
        fit = self._weigh(config, self._memory.free_bytes)
        fits = partial(self._fits_with, config, "swap_space_bytes")
        value = _largest(lambda n: fits(n * fit.block_bytes), 0, fit.host_tier_bytes // fit.block_bytes)
        if fit.host_tier_bytes and value is not None:
            yield Remedy("swap_space_bytes", value * fit.block_bytes)

    def _pool_error(self, config: EngineConfig, fit: _Fit) -> OutOfMemoryError:
        demand, memory, num_blocks = fit.demand, self._memory, max(fit.num_blocks, 1)
        return OutOfMemoryError(
            f"the engine does not fit on {self._device}: weights {in_units(demand.weights_bytes)}, workspace "
            f"{_workspace(demand)}, KV cache {in_units(num_blocks * fit.block_bytes)} ({num_blocks} blocks "
            f"of {config.block_size} tokens){_host_tier(fit)}, and {in_units(memory.free_bytes)} of {in_units(memory.total_bytes)} are free",
            value=num_blocks * fit.block_bytes,
            limit=max(0, fit.left),
            remedy=self._advice(config),
            param="num_blocks",
        )

    def _context_error(self, config: EngineConfig, fit: _Fit) -> OutOfMemoryError:
        return OutOfMemoryError(
            f"max_model_len {config.max_model_len} needs {fit.needed} KV blocks "
            f"({in_units(fit.needed * fit.block_bytes)}), the pool has {fit.num_blocks} "
            f"({in_units(fit.num_blocks * fit.block_bytes)}, {fit.block_bytes // config.block_size} bytes a token): "
            f"weights {in_units(fit.demand.weights_bytes)}{_host_tier(fit)} and workspace {_workspace(fit.demand)} leave "
            f"{in_units(fit.left)} of {in_units(self._memory.free_bytes)}",
            value=config.max_model_len,
            limit=fit.num_blocks * config.block_size,
            remedy=self._advice(config),
            param="max_model_len",
        )

    def _advice(self, config: EngineConfig) -> str:
        found = self.remedies(config)
        if not found:
            return "Use a smaller model, or free memory on the device."
        if len(found) == 1:
            return f"Set {found[0]}."
        return f"Any one of these fits: {', '.join(map(str, found))}."


def _workspace(demand: Demand) -> str:
    graphs = f" and captured graphs {in_units(demand.graphs_bytes)}" if demand.graphs_bytes else ""
    return in_units(demand.workspace_bytes) + graphs


def check_swap_space(config: EngineConfig, kv_spec: KVSpec, host: DeviceMemory) -> None:
    """Refuse a host tier that holds no block, or that the host's free memory cannot hold.

    Raises:
        ConfigError, OutOfMemoryError: naming value, limit and remedy.
    """
    asked, block_bytes = config.swap_space_bytes, kv_spec.bytes_per_block
    if 0 < asked < block_bytes:
        raise ConfigError(
            f"swap_space_bytes {asked} holds no KV block, which takes {block_bytes}",
            value=asked,
            limit=block_bytes,
            param="swap_space_bytes",
            remedy=f"Set swap_space_bytes={block_bytes} or more, or 0 for no host tier.",
        )
    if asked > host.free_bytes:
        most = kv_spec.num_blocks_in(host.free_bytes) * block_bytes
        raise OutOfMemoryError(
            f"a host tier of {in_units(asked)} does not fit in the host's memory, of which {in_units(host.free_bytes)} of "
            f"{in_units(host.total_bytes)} are free",
            value=asked,
            limit=most,
            param="swap_space_bytes",
            remedy=f"Set swap_space_bytes={most} or less.",
        )


def _host_tier(fit: _Fit) -> str:
    return f", host tier {in_units(fit.host_tier_bytes)}" if fit.host_tier_bytes else ""


def _largest(fits: Callable[[int], bool], low: int, high: int) -> int | None:
    """The largest value in [low, high] that fits, where a smaller one fits whenever a larger one does."""
    if low > high or not fits(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low
