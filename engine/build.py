"""Composition root: an EngineConfig becomes an Engine on this machine's device.

`resolve_config` turns every automatic setting into a value, from the model's config and the device, before a weight is
read; `build_engine` loads the weights, sizes the KV cache again where the device tells what a step takes, makes the runner
and hands both to the Engine. The only module that knows all parts; nothing below imports it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

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
    kv_spec_of,
    make_ledger,
    torch_dtype,
    workspace_bytes,
)
from engine.model_folder import find_model, generation_eos_ids, has_tokenizer
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder, StepDecoder
from engine.models.fused_cpu import FusedCpuDecoder
from engine.models.lora import LoraSlots
from engine.models.quantized import (
    check_checkpoint,
    check_quantization,
    held_forms,
    quantize_decoder,
    set_deterministic,
)
from engine.models.transformers_config import TransformersConfig, read_model_config, settle_for
from engine.models.weights import load_weights
from engine.needle import find_needle
from engine.pool_size import Measured, PoolSizer, check_swap_space
from engine.pooling import ModelPooling
from engine.pooling_files import read_pooling
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
    device = choose_device(config.device)
    asked, config = config, replace(config, device=str(device), dtype=choose_dtype(config.dtype, device))
    dtype = torch_dtype(config)
    check_checkpoint(config.quantization, model)
    if config.quantization is not None:
        check_quantization(
            config.quantization, model, dtype=dtype, device=device, deterministic=config.deterministic
        )
    _check_parts(config, model, device)
    config = replace(config, kv_cache_dtype=_resolve_kv_cache(asked, config, model))
    backend = _resolve_attention(config, model, dtype, device)
    batched = config.max_batched_tokens
    if batched is None:
        batched = max(
            GPU_BATCHED_TOKENS if device.type == "cuda" else CPU_BATCHED_TOKENS, config.max_num_seqs
        )
    threads = config.num_threads or available_cores()
    config = replace(config, attention_backend=backend, max_batched_tokens=batched, num_threads=threads)
    memory = memory or device_memory(device)
    host = memory if device.type == "cpu" else device_memory(torch.device("cpu"))
    check_swap_space(config, kv_spec_of(config, model), host)
    return PoolSizer(model, device, memory).resolve(config)


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
    device = torch.device(config.device)
    if device.type == "cuda":
        keep_triton_kernels()
    if device.type == "cuda" and allocator is None:
        allocator = CudaAllocator(device)
    before = device_memory(device) if allocator is None else allocator.memory()
    assert config.num_threads is not None
    if device.type == "cpu":
        torch.set_num_threads(config.num_threads)
    eos_token_ids = model.eos_token_ids | generation_eos_ids(folder)
    pooling = read_pooling(folder, ModelPooling(size=model.hidden_size))
    load_decoder = partial(_load_decoder, config, model, folder, load)
    with ThreadPoolExecutor(1, "tokenizer") as beside:  # most of it is imports, while weights are copied
        loading = beside.submit(_load_tokenizer, folder, config)
        decoder = load_decoder(lambda message, share: tell(message, 0.05 + 0.85 * share))
        tokenizer = loading.result()
    if tokenizer is not None:
        eos_token_ids |= tokenizer.eos_token_ids
    loaded = _Loaded(asked, config, model, decoder, load_decoder, tokenizer, eos_token_ids, pooling)
    engine = _assemble(loaded, allocator, before, tell)
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
    # fp8 rounds what the linear layers multiply, which the compiled step does not
    elif config.attention_backend == "cpu" and config.quantization != "fp8":
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
class _Loaded:
    """A model whose weights are in memory, with the config as it was asked for and as it was resolved."""

    asked: EngineConfig
    config: EngineConfig
    model: ModelConfig
    decoder: StepDecoder
    load_decoder: Callable[[Progress], StepDecoder]  # makes another one of it
    tokenizer: Tokenizer | None
    eos_token_ids: frozenset[int]
    pooling: ModelPooling


def _assemble(loaded: _Loaded, allocator: Allocator | None, before: DeviceMemory, tell: Progress) -> Engine:
    """The engine of a loaded model. `before`: the device's memory before the weights were read."""
    config, model, eos_token_ids = loaded.config, loaded.model, loaded.eos_token_ids
    device, dtype = torch.device(config.device), torch_dtype(config)
    kv_spec = kv_spec_of(config, model)
    decoder, load_another = loaded.decoder, loaded.load_decoder
    lora_slots = _make_lora_slots(decoder, config)

    def load_decoder() -> StepDecoder:  # holds nothing of `loaded`, whose decoder must be able to go
        again = load_another(_tell_nobody)
        _use_lora_slots(again, lora_slots, config)
        return again

    def make_runner(config: EngineConfig) -> ModelRunner:
        return ModelRunner(
            decoder, make_attention(config), config=config, kv_spec=kv_spec, eos_token_ids=eos_token_ids, device=device,
            dtype=dtype, lora_slots=lora_slots, load_decoder=load_decoder,
        )  # fmt: skip

    demand = Demand(decoder_bytes(decoder), workspace_bytes(config, model, dtype, device))
    graphs_before = 0 if allocator is None else allocator.graph_bytes()  # of other engines
    if allocator is not None:
        tell("measuring the largest step", 0.91)
        step = measure_steps(make_runner, config, kv_spec, allocator, model.vocab_size)
        demand = Demand(demand.weights_bytes, step.workspace_bytes, step.graphs_bytes)
        config = _size_again(loaded, demand, allocator.memory())
    tell("allocating the KV cache", 0.92)
    runner = make_runner(config)
    runner.capture(lambda share: tell("capturing decode steps", 0.93 + 0.07 * share))
    ledger = make_ledger(
        config, model, kv_spec, dtype, device, demand=demand,
        graphs_bytes=0 if allocator is None else allocator.graph_bytes() - graphs_before,
        other_bytes=before.total_bytes - before.free_bytes,
    )  # fmt: skip

    def make_engine(is_proven_deterministic: bool | None = None) -> Engine:
        return Engine(
            config, runner, kv_spec=kv_spec, eos_token_ids=eos_token_ids, vocab_size=model.vocab_size,
            tokenizer=loaded.tokenizer, memory=ledger, lora_store=runner.adapters, is_proven_deterministic=is_proven_deterministic,
            pooling=loaded.pooling,
        )  # fmt: skip

    if not config.deterministic:
        return make_engine()
    tell("proving deterministic mode", 0.99)
    proof = find_needle(make_engine(), model.vocab_size)
    runner.reset_rows()
    if not proof.holds:
        log.warning("deterministic mode does not hold on %s: %s", device, proof.difference)
    return make_engine(proof.holds)


def _size_again(loaded: _Loaded, demand: Demand, now: DeviceMemory) -> EngineConfig:
    """The resolved config with its pool sized by what was measured. Its context, for which tables exist, only shrinks.

    Raises:
        OutOfMemoryError: what was asked for does not fit beside what was measured.
    """
    asked, config = loaded.asked, loaded.config
    without_weights = DeviceMemory(now.total_bytes, now.free_bytes + demand.weights_bytes)
    sizer = PoolSizer(loaded.model, torch.device(config.device), without_weights, Measured(config, demand))
    reopened = replace(config, num_blocks=asked.num_blocks, kv_memory_bytes=asked.kv_memory_bytes)
    return sizer.resolve(reopened, may_clip=asked.max_model_len is None)


def _load_decoder(
    config: EngineConfig, model: ModelConfig, folder: Path, load: Loader, progress: Progress
) -> StepDecoder:
    """The model of a folder in the form that runs."""
    assert config.max_model_len is not None
    if isinstance(model, TransformersConfig):
        return _load_transformers_decoder(config, model, folder, progress)
    dtype, device = torch_dtype(config), torch.device(config.device)
    decoder = Decoder(
        model, dtype=dtype, device=device, max_positions=config.max_model_len,
        held_forms=held_forms(model, dtype=dtype, device=device, deterministic=config.deterministic),
    )  # fmt: skip
    load(decoder, folder, progress)
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


def _resolve_attention(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device
) -> str:
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
