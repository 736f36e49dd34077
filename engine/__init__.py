"""Quire's inference engine: paged KV cache, continuous batching, one thread that owns the device.

    LLM            prompts in, completions out: for notebooks and scripts
    EngineWorker   streams for many callers: for servers
    Engine         the steps themselves, deterministic given their inputs

The house's line: importing this package imports no torch, triton or transformers, and neither does anything that decides
rather than computes (scheduler, cache accounting, records, streams, worker). What computes is below it: ``engine.build``,
``engine.encoder.model``, ``engine.runner``, ``engine.models``, ``engine.attention``, ``engine.kernels``.
"""

from engine.config import EngineConfig, SpeculativeConfig
from engine.embedding import Embedding, Relevance
from engine.engine import Engine
from engine.errors import (
    ConfigError,
    CorruptWeightsError,
    EngineAsleepError,
    EngineBusyError,
    EngineDeadError,
    EngineError,
    InvalidParamsError,
    InvalidRequestError,
    ModelLoadError,
    ModelNotFoundError,
    OutOfMemoryError,
    PromptTooLongError,
    QueueFullError,
    StepFailedError,
    UnsupportedAdapterError,
    UnsupportedModelError,
)
from engine.llm import LLM, Score
from engine.lora import Lora
from engine.plan import TokenLogprobs
from engine.pooling import PoolingParams
from engine.record_log import BlockMap, RecordLog
from engine.records import (
    Completion,
    EngineEvent,
    EngineStats,
    Health,
    HealthState,
    MemoryLedger,
    RequestRecord,
    Sink,
    StepRecord,
    StreamDelta,
)
from engine.request import FinishReason
from engine.sampling_params import SamplingParams
from engine.scoring import Perplexity
from engine.stream import RequestStream
from engine.token_kl import TokenKL
from engine.tokenizer import Tokenizer
from engine.worker import EngineWorker

__all__ = [
    "LLM",
    "BlockMap",
    "Completion",
    "ConfigError",
    "CorruptWeightsError",
    "Embedding",
    "Engine",
    "EngineAsleepError",
    "EngineBusyError",
    "EngineConfig",
    "EngineDeadError",
    "EngineError",
    "EngineEvent",
    "EngineStats",
    "EngineWorker",
    "FinishReason",
    "Health",
    "HealthState",
    "InvalidParamsError",
    "InvalidRequestError",
    "Lora",
    "MemoryLedger",
    "ModelLoadError",
    "ModelNotFoundError",
    "OutOfMemoryError",
    "Perplexity",
    "PoolingParams",
    "PromptTooLongError",
    "QueueFullError",
    "RecordLog",
    "Relevance",
    "RequestRecord",
    "RequestStream",
    "SamplingParams",
    "Score",
    "Sink",
    "SpeculativeConfig",
    "StepFailedError",
    "StepRecord",
    "StreamDelta",
    "TokenKL",
    "TokenLogprobs",
    "Tokenizer",
    "UnsupportedAdapterError",
    "UnsupportedModelError",
]
