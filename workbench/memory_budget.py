"""One memory budget for all engines of a process: how large the KV cache of each may be, or that there is no room for it.

The first engine on a CPU gets the engine's own defaults; on a GPU, where the default takes nearly all there is, it leaves
room for a successor of its own size, so that a swap can load the new one first. A further engine gets a modest pool: a fixed
size on a CPU, half of what is left on a GPU.

Boundary: arithmetic before anything is loaded. Imports torch inside its functions; the byte ledger is ``engine.memory``'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from workbench.settings import FAKE_MODEL

if TYPE_CHECKING:
    from engine.config import EngineConfig
    from engine.memory import DeviceMemory
    from engine.records import MemoryLedger

CPU_SHARE = 0.8  # of the memory that this process may use: for all engines together
GPU_SHARE = 0.92  # of the free memory, as engine.memory has it
CPU_FURTHER_KV_BYTES = 256 << 20  # the pool of a further engine on a CPU
GPU_FURTHER_KV_SHARE = 0.25  # of a GPU's KV memory: what the first engine leaves to others
LEAST_TOKENS = 1024  # a pool below this (or one context) is not worth an engine


class Budget(Protocol):
    """Decides the memory of an engine beside others: the config with its pool set, or a typed refusal."""

    def __call__(self, config: EngineConfig, others: Mapping[str, MemoryLedger]) -> EngineConfig: ...


@dataclass(frozen=True, slots=True)
class _Needs:
    """What the engine of a config takes, in bytes, beside its KV cache."""

    weights: int
    workspace: int
    block: int  # one KV block
    blocks_a_context: int
    useful_blocks: int  # more could never be used at once
    context: int
    host_tier: int = 0  # of the same memory: nothing beside a GPU

    @property
    def fixed(self) -> int:
        return self.weights + self.workspace + self.host_tier


def fit_beside(config: EngineConfig, others: Mapping[str, MemoryLedger]) -> EngineConfig:
    """`config` with a KV pool that fits beside the engines of `others` (their ids and ledgers).

    Raises:
        OutOfMemoryError: naming what is needed, what is left, who has the rest, and what to do.
        ModelLoadError, ConfigError: as ``engine.build.resolve_config``.
    """
    if config.model == FAKE_MODEL:
        return config
    from engine.encoder.config import is_encoder
    from engine.model_folder import find_model

    if is_encoder(find_model(config.model)):
        return _fit_encoder(config, others)
    import torch

    from engine.build import resolve_config
    from engine.memory import device_memory, held_weight_bytes, kv_specs, torch_dtype, workspace_bytes
    from engine.models.draft import find_draft, max_context
    from engine.models.lora import slots_bytes
    from engine.models.shard import shard_of
    from engine.models.transformers_config import read_model_config

    model = read_model_config(find_model(config.model), trust_remote_code=config.trust_remote_code)
    probe = replace(config, num_blocks=1, kv_memory_bytes=None, max_model_len=None)
    resolved = resolve_config(probe, model)
    model = shard_of(model, 0, config.tensor_parallel_size).share  # what each rank takes
    device, dtype = torch.device(resolved.device), torch_dtype(resolved)
    if not others and (device.type == "cpu" or config.num_blocks or config.kv_memory_bytes):
        return config
    draft = find_draft(config, model, device)
    guessing = 0 if draft is None else held_weight_bytes(draft.model, dtype, device)
    sizes = {"max_loras": config.max_loras, "max_rank": config.max_lora_rank}
    adapters = slots_bytes(model, dtype, **sizes) if config.enable_lora else 0
    most = max_context(model, draft)
    context = min(config.max_model_len or most, most)
    blocks = -(-context // config.block_size)
    needs = _Needs(
        held_weight_bytes(model, dtype, device) + adapters + guessing,
        workspace_bytes(replace(resolved, max_model_len=context), model, dtype, device),
        sum(spec.bytes_per_block for spec in kv_specs(resolved, model, draft)),
        blocks,
        config.max_num_seqs * blocks,
        context,
        config.swap_space_bytes if device.type == "cpu" else 0,
    )
    memory = device_memory(device)
    if not others:
        return replace(config, num_blocks=_first_on_gpu(needs, memory.free_bytes))
    reserved = sum(ledger.engine_bytes for ledger in others.values())
    left = memory.free_bytes
    if device.type == "cpu":
        left = _left_on_cpu(memory, reserved) // config.tensor_parallel_size
    asked = _further(config, needs, left, on_cpu=device.type == "cpu")
    fewest = min(asked, needs.blocks_a_context, -(-LEAST_TOKENS // config.block_size))
    num_blocks = min(asked, (left - needs.fixed) // needs.block)
    if num_blocks < fewest:
        raise _no_room(config, needs.fixed + fewest * needs.block, needs, left, others)
    length = min(context, num_blocks * config.block_size)
    return replace(config, num_blocks=num_blocks, kv_memory_bytes=None, max_model_len=length)


def _fit_encoder(config: EngineConfig, others: Mapping[str, MemoryLedger]) -> EngineConfig:
    """`config` without what the server sets for models that generate; an encoder has no KV pool that could be smaller."""
    import torch

    from engine.device_choice import resolve_device
    from engine.encoder.build import demand_of
    from engine.encoder.config import read_encoder_config
    from engine.errors import OutOfMemoryError
    from engine.memory import device_memory
    from engine.model_folder import find_model

    folder = find_model(config.model)
    context = read_encoder_config(folder).max_context
    config = replace(
        config,
        speculative_config=None,
        tensor_parallel_size=1,
        max_model_len=min(config.max_model_len or context, context),
    )
    resolved = resolve_device(config)
    memory = device_memory(torch.device(resolved.device))
    left = memory.free_bytes
    if resolved.device == "cpu":
        reserved = sum(ledger.engine_bytes for ledger in others.values())
        left = max(0, _left_on_cpu(memory, reserved))
    needed = demand_of(replace(resolved, enable_lora=False), folder).num_bytes
    if needed > left:
        raise OutOfMemoryError(
            f"{config.model} does not fit beside what is resident: it needs {needed} bytes ({in_units(needed)}), {left} "
            f"({in_units(left)}) are left. Resident: {_holders(others)}",
            value=needed, limit=left, param="model", remedy="Unload another model, or choose a narrower QUIRE_DTYPE.",
        )  # fmt: skip
    return config


def check_wake(
    model_id: str, asleep: MemoryLedger, awake: MemoryLedger, others: Mapping[str, MemoryLedger]
) -> None:
    """Refuse to wake a model for whose memory there is no room beside `others`. A GPU's engine finds out by itself.

    Raises:
        OutOfMemoryError: naming what is needed, what is left, who has the rest, and what to do.
    """
    if awake.device != "cpu":
        return
    import torch

    from engine.errors import OutOfMemoryError
    from engine.memory import device_memory

    memory = device_memory(torch.device("cpu"))
    promised = asleep.engine_bytes + sum(ledger.engine_bytes for ledger in others.values())
    left = max(0, _left_on_cpu(memory, promised))
    needed = awake.engine_bytes - asleep.engine_bytes
    if needed > left:
        raise OutOfMemoryError(
            f"{model_id} cannot wake up: it needs {needed} bytes ({in_units(needed)}), {left} ({in_units(left)}) are "
            f"left. Resident: {_holders(others)}",
            value=needed, limit=left, param="id", remedy="Unload another model or put it to sleep first.",
        )  # fmt: skip


def _left_on_cpu(memory: DeviceMemory, promised: int) -> int:
    """Bytes for one more engine. An allocation takes memory only when it is written to: what was promised counts."""
    return min(memory.free_bytes, int(CPU_SHARE * memory.total_bytes) - promised)


def _holders(others: Mapping[str, MemoryLedger]) -> str:
    return ", ".join(f"{name} {in_units(ledger.engine_bytes)}" for name, ledger in others.items())


def _first_on_gpu(needs: _Needs, free: int) -> int:
    """Blocks of the first engine: most of what is left beside a successor's weights; all, where there is no room for one."""
    beside_successor = GPU_SHARE * (free - 2 * needs.fixed) * (1 - GPU_FURTHER_KV_SHARE)
    alone = GPU_SHARE * (free - needs.fixed)
    pool = beside_successor if beside_successor >= 2 * needs.blocks_a_context * needs.block else alone
    return max(1, min(int(pool) // needs.block, needs.useful_blocks))


def _further(config: EngineConfig, needs: _Needs, left: int, *, on_cpu: bool) -> int:
    """Blocks that a further engine should have: a modest pool, but one whole context."""
    modest = CPU_FURTHER_KV_BYTES if on_cpu else int(GPU_SHARE * max(0, left - needs.fixed) / 2)
    asked = min(needs.useful_blocks, max(modest // needs.block, needs.blocks_a_context))
    for limit in (config.num_blocks, (config.kv_memory_bytes or 0) // needs.block):
        asked = min(asked, limit) if limit else asked
    return asked


def _no_room(
    config: EngineConfig, wanted: int, needs: _Needs, left: int, others: Mapping[str, MemoryLedger]
) -> Exception:
    from engine.errors import OutOfMemoryError

    return OutOfMemoryError(
        f"{config.model} does not fit beside what is resident: it needs {wanted} bytes ({in_units(wanted)}: weights "
        f"{in_units(needs.weights)}, workspace {in_units(needs.workspace)}, host tier {in_units(needs.host_tier)}, KV cache at least {in_units(wanted - needs.fixed)}), "
        f"{max(0, left)} ({in_units(max(0, left))}) are left. Resident: {_holders(others)}",
        value=wanted,
        limit=max(0, left),
        param="model",
        remedy=f"Unload {next(iter(others))} or put it to sleep, or restart with fewer KV blocks (QUIRE_NUM_BLOCKS), a smaller "
        "QUIRE_MAX_NUM_SEQS or a narrower QUIRE_DTYPE.",
    )


def in_units(num_bytes: int) -> str:
    """Bytes for people: three digits and a binary unit."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} GiB"
