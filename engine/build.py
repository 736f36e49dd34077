"""Composition root: an EngineConfig becomes an Engine on this machine's device.

`resolve_config` turns every automatic setting into a value, from the model's config and the device, before a weight is
read; `build_engine` loads the weights, sizes the KV cache again where the device tells what a step takes, makes the runner
and hands both to the Engine. The only module that knows all parts; nothing below imports it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from engine.attention.choice import resolve_attention
from engine.attention.interface import AttentionBackend
from engine.config import EngineConfig
from engine.device_choice import available_cores, choose_device, choose_dtype, resolve_device
from engine.encoder.config import is_encoder
from engine.engine import Engine
from engine.errors import ConfigError
from engine.kernels import cpu_library
from engine.kernels.cache_folder import keep_triton_kernels
from engine.kernels.invariant import find_row_tile
from engine.kernels.kv_quantization import QUANTIZED_DTYPES, SETTINGS
from engine.memory import (
    Allocator,
    CudaAllocator,
    Demand,
    DeviceMemory,
    decoder_bytes,
    device_memory,
    estimate_demand,
    kv_spec_of,
    make_ledger,
    torch_dtype,
)
from engine.model_folder import find_model, generation_eos_ids, has_tokenizer
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder, StepDecoder
from engine.models.draft import Draft, check_tokenizers, find_draft
from engine.models.fused_cpu import FusedCpuDecoder
from engine.models.lora import LoraSlots
from engine.models.quantized import (
    check_checkpoint,
    check_quantization,
    held_forms,
    quantize_decoder,
    set_deterministic,
)
from engine.models.shard import Shard, shard_of
from engine.models.transformers_config import TransformersConfig, read_model_config, settle_for
from engine.models.weights import load_weights
from engine.needle import find_needle
from engine.parallel.processes import RankProcesses
from engine.parallel.ranks import Ranks
from engine.parallel.runner import TensorParallelRunner
from engine.parallel.settings import (
    check_files,
    of_all_ranks,
    settle_for_ranks,
    share_of_memory,
    what_all_have,
)
from engine.plan import KVSpec
from engine.pool_size import Measured, PoolSizer, check_swap_space
from engine.pooling import ModelPooling
from engine.pooling_files import read_pooling
from engine.runner.loaded_draft import LoadedDraft
from engine.runner.model_runner import ModelRunner
from engine.runner.profile_run import measure_steps
from engine.tokenizer import Tokenizer

log = logging.getLogger(__name__)
Progress = Callable[[str, float], None]
Loader = Callable[[Decoder, Path, Progress], None]
CPU_BATCHED_TOKENS = 512  # a step of this many tokens keeps running streams fluent on a few cores
GPU_BATCHED_TOKENS = 8192


def resolve_config(
    config: EngineConfig, model: ModelConfig | None = None, memory: DeviceMemory | None = None
) -> EngineConfig:
    """A new config in which nothing is automatic any more. Reads the model's config.json unless `model` is given.

    `memory`: the device's bytes; None: asked of the device.

    Raises:
        ModelNotFoundError, UnsupportedModelError, ModelLoadError: from the model's config.
        ConfigError: a setting that this model or device does not have.
        OutOfMemoryError: weights and KV cache do not fit.
    """
    if model is None:
        model = read_model_config(find_model(config.model), trust_remote_code=config.trust_remote_code)
    config = settle_for(config, model)
    device, size = choose_device(config.device), config.tensor_parallel_size
    model = shard_of(model, 0, size).share
    asked, config = config, settle_for_ranks(config, device)
    config = replace(config, device=str(device), dtype=choose_dtype(config.dtype, device))
    dtype = torch_dtype(config)
    check_checkpoint(config.quantization, model)
    if config.quantization is not None:
        check_quantization(
            config.quantization, model, dtype=dtype, device=device, deterministic=config.deterministic
        )
    _check_parts(config, model, device)
    config = replace(config, kv_cache_dtype=_resolve_kv_cache(asked, config, model))
    backend = resolve_attention(config, model, dtype, device)
    batched = config.max_batched_tokens
    if batched is None:
        batched = max(
            GPU_BATCHED_TOKENS if device.type == "cuda" else CPU_BATCHED_TOKENS, config.max_num_seqs
        )
    threads = config.num_threads or max(1, available_cores() // (size if device.type == "cpu" else 1))
    config = replace(config, attention_backend=backend, max_batched_tokens=batched, num_threads=threads)
    memory = share_of_memory(memory or device_memory(device), device, size)
    draft = find_draft(config, model, device)
    cpu = torch.device("cpu")
    host = memory if device.type == "cpu" else share_of_memory(device_memory(cpu), cpu, size)
    check_swap_space(config, kv_spec_of(config, model), host)
    return PoolSizer(model, device, memory, draft=draft).resolve(config)


def build_engine(
    config: EngineConfig,
    *,
    progress: Progress | None = None,
    allocator: Allocator | None = None,
    load: Loader = load_weights,
) -> Engine:
    """Load the model and make its engine. `progress` gets a message and a share in [0, 1], from this thread.

    `allocator`: tells what the device's memory is used for; None: torch's own on a GPU, on a CPU there is none.
    `load` fills the native decoder's weights from the model's folder; benchmarks bring weights that are in no file.

    Raises:
        EngineError: as `resolve_config`, and CorruptWeightsError while weights are read.
    """
    tell: Progress = progress or _tell_nobody
    tell("reading the model's config", 0.0)
    folder = find_model(config.model)
    if is_encoder(folder):
        from engine.encoder.build import build_encoder  # transformers, which native models do not need

        return build_encoder(resolve_device(config), folder, tell)
    model = read_model_config(folder, trust_remote_code=config.trust_remote_code)
    asked, config = config, resolve_config(config, model, None if allocator is None else allocator.memory())
    shard = shard_of(model, 0, config.tensor_parallel_size)
    check_files(folder, shard.size)
    draft = find_draft(config, model, torch.device(config.device))
    if draft is not None:
        check_tokenizers(draft, folder)
    if allocator is None and torch.device(config.device).type == "cuda":
        allocator = CudaAllocator(torch.device(config.device))
    before = device_memory(torch.device(config.device)) if allocator is None else allocator.memory()
    with ExitStack() as undo:
        processes = undo.enter_context(RankProcesses(asked, config)) if shard.size > 1 else None
        loaded = load_part(
            asked,
            config,
            shard,
            folder,
            load,
            lambda message, share: tell(message, 0.05 + 0.85 * share),
            draft=draft,
        )
        engine = _assemble(loaded, allocator, before, tell, processes)
        undo.pop_all()  # the engine ends them
    tell("ready", 1.0)
    return engine


def make_attention(config: EngineConfig) -> AttentionBackend:
    """The attention backend that a resolved config names."""
    if config.attention_backend == "triton":
        from engine.attention.triton_paged import TritonPagedAttention

        return TritonPagedAttention(deterministic=config.deterministic)
    if config.attention_backend == "cpu":
        from engine.attention.cpu import make_cpu_attention

        return make_cpu_attention(deterministic=config.deterministic)
    from engine.attention.reference import ReferenceAttention

    return ReferenceAttention(deterministic=config.deterministic)


def prepare_decoder(decoder: Decoder, config: EngineConfig) -> StepDecoder:
    """The loaded decoder in the form that runs: one compiled call a step beside the compiled CPU attention, else torch."""
    unfused = ", ".join(decoder.config.unfused(torch.device(config.device).type))
    if unfused:
        log.info("%s has what no fused step computes (%s): torch's operations", config.model, unfused)
    # fp8 rounds what the linear layers multiply, which the compiled step does not; nor does it stop to sum over ranks
    elif (
        config.attention_backend == "cpu"
        and config.quantization != "fp8"
        and config.tensor_parallel_size == 1
    ):
        library = cpu_library.load()
        assert library is not None, "the config was resolved where the compiled kernels work"
        return FusedCpuDecoder(decoder, library)
    if config.attention_backend == "triton" and not unfused:
        decoder.use_kernels(deterministic=config.deterministic)
    elif config.deterministic:
        decoder.set_row_tile(find_row_tile(decoder.matrices()))
    return decoder


def _make_lora_slots(decoder: StepDecoder, config: EngineConfig) -> LoraSlots | None:
    """Slots for adapters in a prepared decoder, where the config wants them."""
    if not config.enable_lora:
        return None
    slots = LoraSlots(
        decoder.config, max_loras=config.max_loras, max_rank=config.max_lora_rank, dtype=torch_dtype(config),
        device=torch.device(config.device),
    )  # fmt: skip
    _use_lora_slots(decoder, slots, config)
    return slots


def _use_lora_slots(decoder: StepDecoder, slots: LoraSlots | None, config: EngineConfig) -> None:
    """Have a prepared decoder add what the adapters in the slots make."""
    if slots is None:
        return
    if isinstance(decoder, FusedCpuDecoder):
        decoder.use_lora(slots)
    else:
        assert isinstance(decoder, Decoder), type(decoder)
        slots.attach(
            decoder,
            use_kernel=config.attention_backend == "triton",
            deterministic=config.deterministic,
        )


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model whose weights are in memory, with the config as it was asked for and as it was resolved; of ranks, one's part."""

    asked: EngineConfig
    config: EngineConfig
    model: ModelConfig
    decoder: StepDecoder
    load_decoder: Callable[[Progress], StepDecoder]  # makes another one of it
    tokenizer: Tokenizer | None
    eos_token_ids: frozenset[int]
    ranks: Ranks | None  # whose parts make one model; None: this is the whole
    draft: LoadedDraft | None
    pooling: ModelPooling

    @property
    def found_draft(self) -> Draft | None:
        return None if self.draft is None else self.draft.draft


def _load_draft(config: EngineConfig, draft: Draft, load: Loader) -> LoadedDraft:
    load_decoder = partial(
        _load_decoder, draft.settings(config), draft.model, draft.folder, load, None, _tell_nobody
    )
    return LoadedDraft(draft, load_decoder(), load_decoder, make_attention)


@dataclass(frozen=True, slots=True)
class Made:
    """A runner that is ready for steps, and what it was made for."""

    runner: ModelRunner
    config: EngineConfig
    kv_spec: KVSpec
    demand: Demand


def load_part(
    asked: EngineConfig,
    config: EngineConfig,
    shard: Shard,
    folder: Path,
    load: Loader,
    tell: Progress,
    *,
    draft: Draft | None = None,
) -> Loaded:
    """Load what a rank, or the only process, has of a model; rank 0 with its tokenizer."""
    device = torch.device(config.device)
    if device.type == "cuda":
        keep_triton_kernels()
    assert config.num_threads is not None
    if device.type == "cpu":
        torch.set_num_threads(config.num_threads)
    ranks = None
    if shard.size > 1:  # the others wait longer, so that it is rank 0 that says who hangs
        ranks = Ranks(shard, device, timeout_s=config.distributed_timeout_seconds * (2 if shard.rank else 1))
    load_decoder = partial(_load_decoder, config, shard.share, folder, load, ranks)
    with ThreadPoolExecutor(1, "tokenizer") as beside:  # most of it is imports, while weights are copied
        loading = beside.submit(_load_tokenizer, folder, config) if shard.rank == 0 else None
        decoder = load_decoder(tell)
        loaded_draft = None if draft is None else _load_draft(config, draft, load)
        tokenizer = None if loading is None else loading.result()
    eos_token_ids = shard.model.eos_token_ids | generation_eos_ids(folder)
    if tokenizer is not None:
        eos_token_ids |= tokenizer.eos_token_ids
    return Loaded(
        asked, config, shard.share, decoder, load_decoder, tokenizer, eos_token_ids, ranks, loaded_draft,
        read_pooling(folder, ModelPooling(size=shard.model.hidden_size)),
    )  # fmt: skip


def make_ready_runner(loaded: Loaded, allocator: Allocator | None, tell: Progress) -> Made:
    """The runner of a loaded model, its cache sized by what the device tells, its steps captured."""
    config, model = loaded.config, loaded.model
    device, dtype = torch.device(config.device), torch_dtype(config)
    kv_spec = kv_spec_of(config, model)
    decoder, load_another, ranks, draft = loaded.decoder, loaded.load_decoder, loaded.ranks, loaded.draft
    eos_token_ids = loaded.eos_token_ids
    lora_slots = _make_lora_slots(decoder, config)

    def load_decoder() -> StepDecoder:  # holds nothing of `loaded`, whose decoder must be able to go
        again = load_another(_tell_nobody)
        _use_lora_slots(again, lora_slots, config)
        return again

    def make_runner(config: EngineConfig) -> ModelRunner:
        return ModelRunner(
            decoder, make_attention(config), config=config, kv_spec=kv_spec, eos_token_ids=eos_token_ids, device=device,
            dtype=dtype, lora_slots=lora_slots, load_decoder=load_decoder, ranks=ranks,
            draft=None if draft is None else draft.beside(config),
        )  # fmt: skip

    held = decoder_bytes(decoder) + (0 if draft is None else decoder_bytes(draft.decoder))
    demand = replace(estimate_demand(config, model, dtype, device, loaded.found_draft), weights_bytes=held)
    if allocator is not None:
        tell("measuring the largest step", 0.91)
        step = measure_steps(make_runner, config, kv_spec, allocator, model.vocab_size)
        demand = Demand(demand.weights_bytes, step.workspace_bytes, step.graphs_bytes)
        config = _size_again(loaded, demand, allocator.memory())
    tell("allocating the KV cache", 0.92)
    runner = make_runner(config)
    runner.capture(lambda share: tell("capturing decode steps", 0.93 + 0.07 * share))
    return Made(runner, config, kv_spec, demand)


def _assemble(
    loaded: Loaded,
    allocator: Allocator | None,
    before: DeviceMemory,
    tell: Progress,
    processes: RankProcesses | None,
) -> Engine:
    """The engine of a loaded model. `before`: the device's memory before the weights were read."""
    graphs_before = 0 if allocator is None else allocator.graph_bytes()  # of other engines
    if processes is not None and loaded.ranks is not None:
        tell("waiting for the other ranks", 0.9)
        loaded.ranks.connect(processes.connect())
    made = make_ready_runner(loaded, allocator, tell)
    config, model, kv_spec, demand = made.config, loaded.model, made.kv_spec, made.demand
    device, dtype = torch.device(config.device), torch_dtype(config)
    runner: ModelRunner | TensorParallelRunner = made.runner
    if processes is not None and loaded.ranks is not None:
        runner = TensorParallelRunner(made.runner, loaded.ranks, processes)
    ledger = make_ledger(
        config, model, kv_spec, dtype, device, demand=demand,
        graphs_bytes=0 if allocator is None else allocator.graph_bytes() - graphs_before,
        other_bytes=before.total_bytes - before.free_bytes, draft=loaded.found_draft,
    )  # fmt: skip
    ledger = of_all_ranks(ledger, config.tensor_parallel_size)

    def make_engine(is_proven_deterministic: bool | None = None) -> Engine:
        return Engine(
            config, runner, kv_spec=kv_spec, eos_token_ids=loaded.eos_token_ids, vocab_size=model.vocab_size,
            tokenizer=loaded.tokenizer, memory=ledger, lora_store=made.runner.adapters,
            is_proven_deterministic=is_proven_deterministic,
            pooling=loaded.pooling,
        )  # fmt: skip

    if not config.deterministic:
        engine = make_engine()
        if isinstance(runner, TensorParallelRunner):
            runner.on_lost = engine.lost
        return engine
    tell("proving deterministic mode", 0.99)
    proof = find_needle(make_engine(), model.vocab_size)
    runner.reset_rows()
    if not proof.holds:
        log.warning("deterministic mode does not hold on %s: %s", device, proof.difference)
    return make_engine(proof.holds)


def _size_again(loaded: Loaded, demand: Demand, now: DeviceMemory) -> EngineConfig:
    """The resolved config with its pool sized by what was measured. Its context, for which tables exist, only shrinks.

    Raises:
        OutOfMemoryError: what was asked for does not fit beside what was measured.
    """
    asked, config = loaded.asked, loaded.config
    without_weights = DeviceMemory(now.total_bytes, now.free_bytes + demand.weights_bytes)
    sizer = PoolSizer(
        loaded.model, torch.device(config.device), without_weights, Measured(config, demand),
        loaded.found_draft,
    )  # fmt: skip
    reopened = replace(config, num_blocks=asked.num_blocks, kv_memory_bytes=asked.kv_memory_bytes)
    sized = sizer.resolve(reopened, may_clip=asked.max_model_len is None)
    return sized if loaded.ranks is None else what_all_have(sized, loaded.model, loaded.ranks)


def _load_decoder(
    config: EngineConfig,
    model: ModelConfig,
    folder: Path,
    load: Loader,
    ranks: Ranks | None,
    progress: Progress,
) -> StepDecoder:
    """The model of a folder in the form that runs."""
    assert config.max_model_len is not None
    if isinstance(model, TransformersConfig):
        return _load_transformers_decoder(config, model, folder, progress)
    dtype, device = torch_dtype(config), torch.device(config.device)
    decoder = Decoder(
        model, dtype=dtype, device=device, max_positions=config.max_model_len,
        held_forms=held_forms(model, dtype=dtype, device=device, deterministic=config.deterministic),
        shard=None if ranks is None else ranks.shard,
    )  # fmt: skip
    load(decoder, folder, progress)
    if ranks is not None:
        decoder.sum_over(ranks.all_reduce)
    set_deterministic(decoder, config.deterministic)
    if config.quantization is not None:
        quantize_decoder(decoder, config.quantization, deterministic=config.deterministic)
    return prepare_decoder(decoder, config)


def _load_transformers_decoder(
    config: EngineConfig, model: TransformersConfig, folder: Path, progress: Progress
) -> StepDecoder:
    """The model of a folder that transformers' code computes."""
    from engine.models.transformers_decoder import TransformersDecoder

    decoder = TransformersDecoder(
        model, folder, dtype=torch_dtype(config), device=torch.device(config.device),
        trust_remote_code=config.trust_remote_code,
    )  # fmt: skip
    load_weights(decoder, folder, progress)
    return decoder


def _tell_nobody(message: str, share: float) -> None:
    pass


def _load_tokenizer(folder: Path, config: EngineConfig) -> Tokenizer | None:
    if not has_tokenizer(folder):
        return None
    return Tokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code)


def _check_parts(config: EngineConfig, model: ModelConfig, device: torch.device) -> None:
    """Refuse what a GPU does not compute of a model's parts.

    Raises:
        ConfigError: deterministic mode beside parts without a kernel whose rows keep their bits, or experts in float64.
    """
    if device.type != "cuda":
        return
    unproven = (*model.unfused(device.type), *(("experts",) if model.moe is not None else ()))
    if config.deterministic and unproven:
        raise ConfigError(
            f"deterministic mode on {device} does not have this model's {', '.join(unproven)}",
            value=True,
            limit=False,
            param="deterministic",
            remedy='Set deterministic=False, or device="cpu".',
        )
    if model.moe is not None and config.dtype == "float64":
        raise ConfigError(
            f"experts on {device} have no float64 product",
            value="float64",
            limit=["bfloat16", "float16", "float32"],
            param="dtype",
            remedy='Set dtype="bfloat16".',
        )


def _resolve_kv_cache(asked: EngineConfig, config: EngineConfig, model: ModelConfig) -> str:
    """What the cache holds. A CPU may keep bfloat16 beside float32, and does where it computes a bfloat16 checkpoint in float32
    only because that is faster: decoding reads half the bytes, and keys and values are rounded as they are on a GPU. Of the bundled
    model that costs 0.000017 nats a token (``tests/engine/models/test_quality.py``).
    """
    name = config.kv_cache_dtype
    if name in SETTINGS:
        return QUANTIZED_DTYPES[SETTINGS[name]]
    on_cpu = config.device == "cpu" and config.dtype == "float32"
    if on_cpu and (name == "bfloat16" or (name == asked.dtype == "auto" and model.dtype == "bfloat16")):
        return "bfloat16"
    if name not in ("auto", config.dtype):
        raise ConfigError(
            f"kv_cache_dtype {name!r} beside dtype {config.dtype!r} on {config.device}: an unquantized cache has the compute dtype, "
            "or on a CPU bfloat16 beside float32",
            value=name,
            limit=("auto", config.dtype, *SETTINGS),
            param="kv_cache_dtype",
            remedy='Set kv_cache_dtype="auto", "int8" or "fp8".',
        )
    return config.dtype
