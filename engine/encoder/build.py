"""Building an encoder's engine: what it takes is checked against the device before its weights are read.

Boundary: composition, as ``engine.build`` for models that generate, which calls this. Source of the estimate: the sizes in config.json.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.encoder.config import EncoderConfig, read_encoder_config
from engine.encoder.engine import EncoderEngine
from engine.encoder.model import EncoderModel
from engine.errors import ConfigError, OutOfMemoryError, UnsupportedModelError
from engine.memory import Demand, device_memory, in_units, torch_dtype
from engine.model_folder import has_tokenizer
from engine.models.weights import weight_files
from engine.records import MemoryLedger
from engine.tokenizer import Tokenizer

Progress = Callable[[str, float], None]
BATCHED_TOKENS = {"cpu": 4096, "cuda": 32768}
HELD_STATES = 12  # hidden states of a batch that a layer holds at once: inputs, projections, the wide MLP
HELD_SCORES = (
    3  # copies of a batch's attention scores, where its code makes them; else one mask for all heads
)


def build_encoder(config: EngineConfig, folder: Path, progress: Progress) -> EncoderEngine:
    """Load the encoder of a folder. `config`: device, dtype and threads are resolved.

    Raises:
        ConfigError: a setting that encoders do not have.
        OutOfMemoryError: it does not fit.
        ModelLoadError: as `EncoderModel`; or the folder has no tokenizer.
    """
    encoder = read_encoder_config(folder)
    config = resolve(config, encoder)
    device, dtype = torch.device(config.device), torch_dtype(config)
    if device.type == "cpu":
        assert config.num_threads is not None
        torch.set_num_threads(config.num_threads)
    before = device_memory(device)
    demand = demand_of(config, folder)
    if demand.num_bytes > before.free_bytes:
        raise OutOfMemoryError(
            f"{config.model} needs {demand.num_bytes} bytes ({in_units(demand.num_bytes)}), "
            f"{before.free_bytes} ({in_units(before.free_bytes)}) are free on {device}",
            value=demand.num_bytes, limit=before.free_bytes, param="model", remedy="Free memory, or lower max_batched_tokens.",
        )  # fmt: skip
    if not has_tokenizer(folder):
        raise UnsupportedModelError(
            f"{folder} holds no tokenizer", value=str(folder), param="model", remedy="Add tokenizer.json to the folder."
        )  # fmt: skip
    tokenizer = Tokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    model = EncoderModel(
        encoder, folder, dtype=dtype, device=device,
        progress=lambda message, share: progress(message, 0.05 + 0.9 * share),
    )  # fmt: skip
    ledger = MemoryLedger(
        weights_bytes=model.weight_bytes, kv_bytes=0, workspace_bytes=demand.workspace_bytes,
        total_bytes=before.total_bytes, device=device.type, other_bytes=before.total_bytes - before.free_bytes,
    )  # fmt: skip
    progress("ready", 1.0)
    return EncoderEngine(
        config,
        model,
        pooling=encoder.pooling,
        vocab_size=encoder.vocab_size,
        tokenizer=tokenizer,
        memory=ledger,
    )


def resolve(config: EngineConfig, encoder: EncoderConfig) -> EngineConfig:
    """A config in which nothing that encoders have is automatic any more.

    Raises:
        ConfigError: a setting that they do not have, or a context beyond the model's.
    """
    for setting, off in (
        ("quantization", None),
        ("enable_lora", False),
        ("speculative_config", None),
        ("tensor_parallel_size", 1),
    ):
        if getattr(config, setting) != off:
            raise ConfigError(
                f"{encoder.architecture} is an encoder and has no {setting}", value=getattr(config, setting), limit=off,
                param=setting, remedy=f"Set {setting}={off}.",
            )  # fmt: skip
    length = config.max_model_len or encoder.max_context
    if length > encoder.max_context:
        raise ConfigError(
            f"max_model_len is {length}, the model reads {encoder.max_context} tokens", value=length,
            limit=encoder.max_context, param="max_model_len", remedy=f"Lower it to {encoder.max_context}.",
        )  # fmt: skip
    batched = config.max_batched_tokens or BATCHED_TOKENS[torch.device(config.device).type]
    return replace(config, max_model_len=length, max_batched_tokens=batched, kv_cache_dtype=config.dtype)


def demand_of(config: EngineConfig, folder: Path) -> Demand:
    """What an encoder takes in bytes, from its files' headers and sizes, before anything is loaded. `config` has device and dtype.

    Raises:
        UnsupportedModelError, CorruptWeightsError, ModelNotFoundError: as ``engine.models.weights.weight_files``.
    """
    encoder = read_encoder_config(folder)
    config = resolve(config, encoder)
    assert config.max_batched_tokens is not None
    assert config.max_model_len is not None
    width = torch_dtype(config).itemsize
    tokens = max(config.max_batched_tokens, config.max_model_len)
    states = HELD_STATES * tokens * encoder.hidden_size
    scores = tokens * config.max_model_len * (HELD_SCORES * encoder.num_heads if encoder.holds_scores else 1)
    weights = sum(path.stat().st_size for path in weight_files(folder))
    return Demand(weights * width // 4 if width > 4 else weights, (states + scores) * width)
