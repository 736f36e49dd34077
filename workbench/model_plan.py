"""What a model takes on a GPU of a given size, for each quantization and KV cache dtype, before anything is loaded.

From the model's config alone, with the engine's own arithmetic (``engine.memory``, ``engine.pool_size``): the GPU need not be
here. Boundary: an estimate. A loaded engine measures its largest step and sizes its cache again.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from workbench.errors import SettingsError
from workbench.memory_budget import in_units

if TYPE_CHECKING:
    from engine.models.config import ModelConfig

DEFAULT_CONTEXT = 8192  # tokens of a sequence, or the model's own context if that is less
KV_CACHES = ("auto", "fp8", "int8")
DTYPES = ("bfloat16", "float16")  # what a GPU's kernels compute in
_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class PlanRow:
    """One choice of weights and KV cache, in bytes."""

    weights: str  # "as stored", or a quantization of EngineConfig
    kv_cache_dtype: str
    weights_bytes: int  # once loaded
    workspace_bytes: int  # of the largest step, at most
    kv_bytes_per_token: int
    num_kv_tokens: int  # that the cache holds; 0: it does not fit
    num_sequences: int  # of the plan's context, at once
    problem: str = ""  # why it does not fit


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """All choices for one model on one size of GPU."""

    model: str
    architecture: str
    num_parameters: int
    stored_as: str  # dtype or quantization of the checkpoint
    dtype: str  # computed in
    gpu_bytes: int
    context: int
    rows: tuple[PlanRow, ...]
    tensor_parallel_size: int = 1  # GPUs of this size; rows say what each of them holds

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def parse_bytes(text: str) -> int:
    """``80GiB``, ``80G``, ``141e9``-like plain numbers and decimal units as bytes.

    Raises:
        SettingsError: no size.
    """
    match = _SIZE.fullmatch(text.strip())
    num_bytes = int(float(match[1]) * _UNITS[match[2].lower()]) if match and match[2].lower() in _UNITS else 0
    if num_bytes < 1:
        raise SettingsError(
            f"{text!r} is no amount of memory", value=text, limit="80GiB, 24GB, …", param="gpu_memory",
            remedy="Give a number and a unit, such as 80GiB.",
        )  # fmt: skip
    return num_bytes


def make_plan(
    name: str,
    *,
    gpu_bytes: int,
    context: int | None = None,
    dtype: str = "bfloat16",
    tensor_parallel_size: int = 1,
) -> ModelPlan:
    """Weigh every quantization and KV cache dtype of a model, by its config, on each of so many GPUs.

    Raises:
        ModelNotFoundError, ModelLoadError, UnsupportedModelError: from the model's config.
        SettingsError, ConfigError: a context beyond the model's, a dtype that a GPU's kernels do not compute in, or a model that
            cannot be split over so many GPUs.
    """
    from engine.config import QUANTIZATIONS
    from engine.encoder.config import is_encoder
    from engine.errors import UnsupportedModelError
    from engine.model_folder import find_config
    from engine.models.shard import shard_of
    from engine.models.transformers_config import read_model_config

    if dtype not in DTYPES:
        raise SettingsError(
            f"no kernel of a GPU computes {dtype!r} quickly", value=dtype, limit=DTYPES, param="dtype",
            remedy=f"Use {' or '.join(DTYPES)}.",
        )  # fmt: skip
    folder = find_config(name)
    if is_encoder(folder):
        raise UnsupportedModelError(
            f"{name} is an encoder: it has no KV cache, which is what a plan weighs", value=name, param="model",
            limit="a model that generates", remedy="Load it: what it takes is compared with the free memory first.",
        )  # fmt: skip
    model = read_model_config(folder)
    context = context or min(DEFAULT_CONTEXT, model.max_context)
    stored = model.quantization
    share = shard_of(model, 0, tensor_parallel_size).share
    may_quantize = stored is None and tensor_parallel_size == 1
    choices: tuple[str | None, ...] = (None, *QUANTIZATIONS) if may_quantize else (None,)
    rows = [
        _weigh(name, share, gpu_bytes, context, dtype, choice, kv) for choice in choices for kv in KV_CACHES
    ]
    return ModelPlan(
        model=name, architecture=model.architecture, num_parameters=model.num_parameters,
        stored_as=stored.method if stored is not None else model.dtype or "unknown", dtype=dtype, gpu_bytes=gpu_bytes,
        context=context, rows=tuple(rows), tensor_parallel_size=tensor_parallel_size,
    )  # fmt: skip


def _weigh(
    name: str, model: ModelConfig, gpu_bytes: int, context: int, dtype: str, quantization: str | None, kv: str
) -> PlanRow:
    import torch

    from engine.build import GPU_BATCHED_TOKENS
    from engine.config import EngineConfig
    from engine.errors import OutOfMemoryError
    from engine.memory import DeviceMemory, estimate_demand, held_demand, kv_spec_of, torch_dtype
    from engine.pool_size import Measured, PoolSizer

    config = EngineConfig(
        model=name, dtype=dtype, device="cuda:0", attention_backend="triton", quantization=quantization,
        kv_cache_dtype=kv, max_model_len=context, max_batched_tokens=GPU_BATCHED_TOKENS,
    )  # fmt: skip
    device, memory = torch.device("cuda:0"), DeviceMemory(gpu_bytes, gpu_bytes)
    compute = torch_dtype(config)
    spec, demand = kv_spec_of(config, model), held_demand(config, model, compute, device)
    num_tokens, problem = 0, ""
    try:
        sized = PoolSizer(model, device, memory, Measured(config, demand)).resolve(config)
        num_tokens = (sized.num_blocks or 0) * config.block_size
    except OutOfMemoryError:
        needed = demand.num_bytes + -(-context // config.block_size) * spec.bytes_per_block
        problem = f"does not fit: one sequence needs {in_units(needed)} in all"
    loading = estimate_demand(config, model, compute, device).weights_bytes
    if not problem and loading > gpu_bytes:
        num_tokens, problem = 0, f"does not fit while loading: {in_units(loading)} of {dtype} first"
    return PlanRow(
        weights=quantization or "as stored", kv_cache_dtype=dtype if kv == "auto" else kv,
        weights_bytes=demand.weights_bytes, workspace_bytes=demand.workspace_bytes,
        kv_bytes_per_token=spec.bytes_per_token, num_kv_tokens=num_tokens, num_sequences=num_tokens // context,
        problem=problem,
    )  # fmt: skip


def render(plan: ModelPlan) -> str:
    """The plan as a table for people."""
    gpus = f"each of {plan.tensor_parallel_size} GPUs of " if plan.tensor_parallel_size > 1 else ""
    head = (
        f"{plan.model}: {plan.architecture}, {plan.num_parameters / 1e9:.3g} B parameters stored as {plan.stored_as}, "
        f"on {gpus}{in_units(plan.gpu_bytes)}, computed in {plan.dtype}"
    )
    form = "{:<11}{:<11}{:>11}{:>12}{:>13}{:>13}{:>14}"
    lines = [
        head,
        form.format("weights", "KV cache", "weights", "workspace", "KV per token", "KV tokens", "sequences"),
    ]
    for row in plan.rows:
        sizes = map(in_units, (row.weights_bytes, row.workspace_bytes, row.kv_bytes_per_token))
        fits = (row.num_kv_tokens, row.num_sequences) if not row.problem else ("–", 0)
        lines.append(
            form.format(row.weights, row.kv_cache_dtype, *sizes, *fits)
            + (f"  {row.problem}" if row.problem else "")
        )
    return "\n".join(
        [*lines, f"Sequences: of {plan.context} tokens, at once, of the engine's 256 rows at most."]
    )
