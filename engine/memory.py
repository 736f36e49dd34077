"""The byte ledger: what an engine takes on its device, by purpose.

Weights and KV cache are counted where they are held. What a step needs beside them is an estimate before anything is
loaded (`workspace_bytes`) and measured afterwards where the device's allocator tells (`Allocator`,
``engine.runner.profile_run``): on a GPU; a CPU keeps the estimate.

Boundary: readings and sums; it allocates nothing. How many KV blocks fit is ``engine.pool_size``'s.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from engine.attention.reference import MAX_GATHERED_VALUES
from engine.config import EngineConfig
from engine.kernels.kv_quantization import QUANTIZED_DTYPES, cache_dtype
from engine.kernels.quantized_weight import GROUP
from engine.models.config import ModelConfig
from engine.models.decoder import StepDecoder
from engine.models.draft import Draft
from engine.models.fused_cpu import FusedCpuDecoder
from engine.models.lora import slots_bytes
from engine.plan import KVSpec
from engine.records import MemoryLedger
from engine.runner.host_blocks import STAGING_BYTES
from engine.runner.model_runner import PROMPT_LOGPROB_ROWS
from engine.runner.parked_weights import storages_of

GPU_FIXED_BYTES = 512 << 20  # kernels, library workspaces, captured graphs
# Upper bounds of what a step holds at once, in copies; a test compares them with a CPU's resident memory.
# Of the sampled rows' logits, in torch's sampler with every filter; the compiled one makes none.
SAMPLER_COPIES = 16
PROMPT_COPIES = 5  # of one part's logits: they, their log-softmax, and the ranks, counted in int64
GATHER_COPIES = 4  # of the keys that the reference attention gathers, or of the scores that it computes
DEFAULT_POOL = (
    0,
    0,
)  # what the CUDA allocator calls the pool of all tensors that belong to no captured graph


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes of a device: all, and what can be taken now."""

    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Demand:
    """What an engine takes beside its KV cache, in bytes."""

    weights_bytes: int
    workspace_bytes: int
    graphs_bytes: int = 0  # captured graphs, where they were measured; an estimated workspace includes them

    @property
    def num_bytes(self) -> int:
        return self.weights_bytes + self.workspace_bytes + self.graphs_bytes

    def beside(self, draft: Demand) -> Demand:
        """With a draft model, whose steps come before the target's and use the same workspace."""
        return replace(
            self,
            weights_bytes=self.weights_bytes + draft.weights_bytes,
            workspace_bytes=max(self.workspace_bytes, draft.workspace_bytes),
        )


class Allocator(Protocol):
    """What a device's allocator tells of its memory, in bytes. `CudaAllocator` is the real one."""

    def memory(self) -> DeviceMemory:
        """The device, its free bytes including what the allocator holds unused."""
        ...

    def reset_peak(self) -> None:
        """Give back what no tensor uses, and forget the peak."""
        ...

    def held_bytes(self) -> int:
        """Held for this process's tensors now, with rounding and unused pieces."""
        ...

    def peak_bytes(self) -> int:
        """The most that was held since `reset_peak`."""
        ...

    def graph_bytes(self) -> int:
        """Held for captured graphs."""
        ...


class CudaAllocator:
    """torch's caching allocator on one GPU. `held_bytes` counts whole segments: what others cannot have."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def memory(self) -> DeviceMemory:
        return device_memory(self._device)

    def reset_peak(self) -> None:
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)

    def held_bytes(self) -> int:
        return torch.cuda.memory_reserved(self._device)

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_reserved(self._device)

    def graph_bytes(self) -> int:
        snapshot = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
        segments = (s for s in snapshot if s["device"] == self._device.index)
        return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) != DEFAULT_POOL)


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


def torch_dtype(config: EngineConfig) -> torch.dtype:
    """The compute dtype of a resolved config."""
    dtype = getattr(torch, config.dtype)
    assert isinstance(dtype, torch.dtype), config.dtype
    return dtype


def kv_spec_of(config: EngineConfig, model: ModelConfig) -> KVSpec:
    """The KV cache that a resolved config asks for."""
    return make_kv_spec(model, config.block_size, cache_dtype(config.kv_cache_dtype, torch_dtype(config)))


def make_kv_spec(model: ModelConfig, block_size: int, dtype: torch.dtype) -> KVSpec:
    """The one KV group of a model: all layers share a block table; windows are masks within it. `dtype`: the cache's."""
    windows, quantized = set(model.sliding_windows), QUANTIZED_DTYPES.get(dtype)
    return KVSpec(
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads,
        head_size=model.head_size,
        block_size=block_size,
        dtype_bytes=dtype.itemsize,
        sliding_window=windows.pop() if len(windows) == 1 else None,
        scale_bytes=4 if quantized == "int8" else 0,
        shared_scale_bytes=4 * model.num_kv_heads if quantized == "fp8" else 0,
    )


def kv_specs(config: EngineConfig, model: ModelConfig, draft: Draft | None) -> tuple[KVSpec, ...]:
    """The KV caches that share the blocks of a resolved config: the model's, then its draft model's."""
    own = kv_spec_of(config, model)
    return (own,) if draft is None else (own, kv_spec_of(draft.settings(config), draft.model))


def workspace_bytes(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device
) -> int:
    """An upper estimate of what a step needs beside weights and KV cache."""
    assert config.max_batched_tokens is not None
    wide = max(dtype.itemsize, 4)
    rows, length = config.max_num_seqs, config.max_model_len or model.max_context
    heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_size
    per_token = dtype.itemsize * (4 * model.hidden_size + 3 * model.mlp_width + 2 * heads) + wide * heads
    if config.enable_lora:
        # What the reference gathers of the layer with the most outputs, adds up and writes back.
        per_token += wide * (model.hidden_size + 6 * model.intermediate_size)
    sampled = rows * (1 if config.attention_backend == "cpu" else SAMPLER_COPIES)
    logits = max(sampled, rows + PROMPT_COPIES * PROMPT_LOGPROB_ROWS) * model.vocab_size * wide
    row_buffers = 4 * rows * (length + -(-length // config.block_size) + 2)
    gathered = _gathered_values(config, model) * GATHER_COPIES * wide
    fixed = GPU_FIXED_BYTES if device.type == "cuda" else 0
    fixed += min(config.swap_space_bytes, STAGING_BYTES)
    return config.max_batched_tokens * per_token + logits + row_buffers + gathered + fixed


def _gathered_values(config: EngineConfig, model: ModelConfig) -> int:
    """What the reference attention gathers or computes at once: keys of decode rows, or scores of a prefill row."""
    # The compiled attention of a CPU hands scores of another form to the reference.
    has_own_form = bool(model.attention_softcap) or model.has_alibi
    if config.attention_backend != "reference" and not (config.attention_backend == "cpu" and has_own_form):
        return 0
    assert config.max_batched_tokens is not None
    length = config.max_model_len or model.max_context
    row = length * model.num_kv_heads * model.head_size
    scores = model.num_heads * min(length, config.max_batched_tokens) * length
    return max(row, min(MAX_GATHERED_VALUES, max(config.max_num_seqs * row, scores)))


def held_weight_bytes(
    model: ModelConfig, dtype: torch.dtype, device: torch.device, quantization: str | None = None
) -> int:
    """Bytes of a loaded model's weights on a device. `quantization`: as in EngineConfig, of a checkpoint that is not quantized.

    To about a thousandth: scales are counted as if every matrix had the hidden size's rows; of a quantized checkpoint all
    layers' matrices are taken to be stored like those of one layer in the middle. A CPU holds floats.
    """
    form = quantization
    if model.quantization is not None:
        found = model.quantization.format_of(f"model.layers.{model.num_layers // 2}.mlp.down_proj")
        form = None if found is None else found.held_form
    # Experts have no quantized product: they become floats.
    if form is None or device.type != "cuda" or model.moe is not None:
        return model.num_parameters * dtype.itemsize
    products = model.num_layer_products
    scales = 3 * products // GROUP if form == "int4" else 4 * products // model.hidden_size
    values = products * (4 if form == "int4" else 8) // 8
    return (model.num_parameters - products) * dtype.itemsize + values + scales


def held_demand(config: EngineConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device) -> Demand:
    """What an engine of this config keeps beside its KV cache once it is loaded: quantized weights as they are held."""
    loading = estimate_demand(config, model, dtype, device)
    while_loading = held_weight_bytes(model, dtype, device)
    held = held_weight_bytes(model, dtype, device, config.quantization)
    return replace(loading, weights_bytes=loading.weights_bytes - while_loading + held)


def estimate_demand(
    config: EngineConfig,
    model: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    draft: Draft | None = None,
) -> Demand:
    """What an engine of this config will take beside its KV cache, before anything is loaded; with its draft model.

    Weights that are quantized while they are loaded count as floats, which they all are for a moment.
    """
    rotary = (config.max_model_len or model.max_context) * model.rotary_size * max(dtype.itemsize, 4)
    rotary *= 1 if model.local_rope is None else 2
    weights = held_weight_bytes(model, dtype, device) + rotary
    if config.enable_lora:
        weights += slots_bytes(model, dtype, max_loras=config.max_loras, max_rank=config.max_lora_rank)
    demand = Demand(weights, workspace_bytes(config, model, dtype, device))
    if draft is None:
        return demand
    return demand.beside(estimate_demand(draft.settings(config), draft.model, dtype, device))


def decoder_bytes(decoder: StepDecoder) -> int:
    """Bytes that a decoder holds between steps: weights in whatever dtype and form they are kept, and its tables."""
    if isinstance(decoder, FusedCpuDecoder):
        return decoder.weight_bytes
    assert isinstance(decoder, nn.Module), type(decoder)
    return sum(storage.nbytes() for storage in storages_of(decoder))


def make_ledger(
    config: EngineConfig,
    model: ModelConfig,
    kv_spec: KVSpec,
    dtype: torch.dtype,
    device: torch.device,
    *,
    demand: Demand | None = None,
    graphs_bytes: int = 0,
    other_bytes: int = 0,
    draft: Draft | None = None,
) -> MemoryLedger:
    """The ledger of a resolved config. `demand`: what was counted or measured; None: the estimate.

    `other_bytes`: what was taken of the device before this engine was built. `draft`: its draft model, counted with the
    weights and the KV cache.
    """
    assert config.num_blocks is not None
    demand = demand or estimate_demand(config, model, dtype, device, draft)
    specs = (kv_spec, *kv_specs(config, model, draft)[1:])
    return MemoryLedger(
        weights_bytes=demand.weights_bytes,
        kv_bytes=sum(spec.pool_bytes(config.num_blocks) for spec in specs),
        workspace_bytes=demand.workspace_bytes,
        total_bytes=device_memory(device).total_bytes,
        device=str(device),
        graphs_bytes=graphs_bytes,
        other_bytes=other_bytes,
        host_tier_bytes=kv_spec.num_blocks_in(config.swap_space_bytes) * kv_spec.bytes_per_block,
    )


def in_units(num_bytes: int) -> str:
    """Bytes for people: four digits and a binary unit."""
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
