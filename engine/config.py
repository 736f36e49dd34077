"""EngineConfig: every setting of one engine, frozen and validated once.

``None`` or ``"auto"`` means: resolved from the model and the device when the engine is built, into a NEW object
(``engine.build.resolve_config``) that can be printed. Nothing here looks at a device or a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from engine.errors import ConfigError

DTYPES = ("auto", "float64", "float32", "bfloat16", "float16")
ATTENTION_BACKENDS = ("auto", "reference", "triton", "cpu")
QUANTIZATIONS = ("int8", "int4", "fp8")
KV_CACHE_DTYPES = (*DTYPES, "fp8", "fp8_e4m3", "int8")
TOOL_CALL_PARSERS = ("hermes", "llama3_json", "mistral", "pythonic", "quire", "qwen3_coder")
REASONING_PARSERS = ("deepseek_r1", "mistral", "none", "qwen3")
LORA_RANKS = (8, 16, 32, 64, 128, 256)
SPECULATION_METHODS = ("ngram", "draft_model")
MAX_SPECULATIVE_TOKENS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculativeConfig:
    """How tokens are guessed that one step then computes together (``engine.speculation``); names follow vLLM's.

    Raises:
        ConfigError: naming the setting, its value and what is accepted.
    """

    # "ngram": what followed the same tokens before, in the prompt or the output; "draft_model": what a smaller model draws.
    method: str = "ngram"
    # Of "draft_model": a folder or a hub id, with the tokenizer of the engine's model.
    model: str | None = None
    num_speculative_tokens: int = 4  # guesses for a sequence in a step, at most
    prompt_lookup_min: int = 2  # tokens that have to occur again
    prompt_lookup_max: int = 4  # the longest run of them that is looked for
    min_gain: float = (
        1.0  # guessing pauses while it brings less than this times the tokens a second; 0: never
    )

    def __post_init__(self) -> None:
        _one_of("speculative_config.method", self.method, SPECULATION_METHODS)
        if (self.method == "draft_model") != bool(self.model):
            raise ConfigError(
                f"speculative_config.model is {self.model!r} beside method {self.method!r}",
                value=self.model,
                limit="a model with method draft_model, none with the others",
                param="speculative_config.model",
                remedy='Name the draft model, or use method="ngram" without one.',
            )
        for name in ("num_speculative_tokens", "prompt_lookup_min", "prompt_lookup_max"):
            _at_least(f"speculative_config.{name}", getattr(self, name), 1)
        if self.num_speculative_tokens > MAX_SPECULATIVE_TOKENS:
            raise ConfigError(
                f"speculative_config.num_speculative_tokens is {self.num_speculative_tokens}, at most {MAX_SPECULATIVE_TOKENS}",
                value=self.num_speculative_tokens,
                limit=MAX_SPECULATIVE_TOKENS,
                param="speculative_config.num_speculative_tokens",
            )
        if self.prompt_lookup_max < self.prompt_lookup_min:
            raise ConfigError(
                f"speculative_config.prompt_lookup_max is {self.prompt_lookup_max}, below prompt_lookup_min {self.prompt_lookup_min}",
                value=self.prompt_lookup_max,
                limit=self.prompt_lookup_min,
                param="speculative_config.prompt_lookup_max",
            )
        if (
            isinstance(self.min_gain, bool)
            or not isinstance(self.min_gain, int | float)
            or not 0 <= self.min_gain <= 100
        ):
            raise ConfigError(
                f"speculative_config.min_gain must be a number from 0 to 100, got {self.min_gain!r}",
                value=self.min_gain,
                limit=(0, 100),
                param="speculative_config.min_gain",
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SpeculativeConfig:
        """Build from plain values; an unknown key raises instead of being dropped."""
        _refuse_unknown(values, cls, "speculative_config.")
        return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of one engine; names and meanings follow vLLM's where vLLM has them.

    Raises:
        ConfigError: naming the setting, its value and what is accepted.
    """

    model: str  # a folder or a hub id
    dtype: str = "auto"  # compute dtype; auto: bfloat16 where the device multiplies it natively, else float32
    device: str = "auto"  # "cpu", "cuda", "cuda:1"; auto: the first GPU, else the CPU
    block_size: int = 16  # tokens a KV block
    num_blocks: int | None = None  # KV blocks in the pool; None: from kv_memory_bytes or the free memory
    kv_memory_bytes: int | None = None
    # Host memory of each rank for cached KV blocks that the pool gave up (host tier); 0: none.
    swap_space_bytes: int = 0
    max_batched_tokens: int | None = None  # token budget of one step
    max_num_seqs: int = 256  # rows: sequences that run at once
    # What may wait for a row, in requests and in tokens; more is refused. "auto": in proportion to max_num_seqs and to what the
    # KV cache holds (engine.queue_limit); None: as much as comes.
    max_queued_requests: int | str | None = None
    max_queued_tokens: int | str | None = None
    max_queue_seconds: float | None = (
        None  # that a request may wait before it is ended; None: as long as it takes
    )
    client_weights: Mapping[str, float] | None = None  # shares of clients that are not 1 (engine.fair_shares)
    max_model_len: int | None = None  # prompt and output tokens of one sequence; None: the model's own
    enable_prefix_cache: bool = True
    deterministic: bool = False  # bitwise the same tokens whatever shares the batch
    quantization: str | None = None  # of the linear layers' weights, and with fp8 of what they multiply
    # Of stored keys and values: dtype's, "fp8" (also "fp8_e4m3"), "int8", on a CPU "bfloat16" too.
    kv_cache_dtype: str = "auto"
    enable_lora: bool = False  # adapters may be loaded while the engine runs
    max_loras: int = 8  # different adapters in one batch: each has a slot on the device
    max_lora_rank: int = 16  # a slot's size; adapters of a lower rank are padded
    speculative_config: SpeculativeConfig | None = None  # also given as a mapping; None: a token a step
    attention_backend: str = "auto"
    enforce_eager: bool = False  # True: no captured graphs on a GPU
    async_scheduling: bool = True  # on a GPU the next step is planned and launched while one runs
    tensor_parallel_size: int = (
        1  # processes that each compute a part of every layer, each on a GPU of its own or the CPU
    )
    distributed_timeout_seconds: int = 60  # how long CPU ranks wait for one that takes no part in a step
    num_threads: int | None = None  # CPU threads of the forward pass, of each rank
    seed: int = 0  # draws the seeds of requests that bring none
    tool_call_parser: str | None = None  # format of the model's tool calls; None: as its chat template shows
    reasoning_parser: str | None = (
        None  # format of its reasoning; None: likewise; "none": an answer like any other
    )
    trust_remote_code: bool = False
    version_digest: str = ""  # content identity of the weights; part of every prefix-cache key
    record_seconds: int = 600  # how far back StepRecords stay in memory

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError(
                "model is empty", value=self.model, remedy="Name a folder or a hub id.", param="model"
            )
        given: Any = self.speculative_config
        if isinstance(given, Mapping):
            object.__setattr__(self, "speculative_config", SpeculativeConfig.from_dict(given))
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        _one_of("attention_backend", self.attention_backend, ATTENTION_BACKENDS)
        for name, allowed in (
            ("quantization", QUANTIZATIONS),
            ("tool_call_parser", TOOL_CALL_PARSERS),
            ("reasoning_parser", REASONING_PARSERS),
        ):
            if getattr(self, name) is not None:
                _one_of(name, getattr(self, name), allowed)
        _one_of("max_lora_rank", self.max_lora_rank, LORA_RANKS)
        for name in (
            "block_size", "max_num_seqs", "max_loras", "record_seconds", "tensor_parallel_size",
            "distributed_timeout_seconds",
        ):  # fmt: skip
            _at_least(name, getattr(self, name), 1)
        _at_least("swap_space_bytes", self.swap_space_bytes, 0)
        if self.swap_space_bytes and not self.enable_prefix_cache:
            raise ConfigError(
                f"swap_space_bytes is {self.swap_space_bytes} without a prefix cache, which alone finds what is kept there",
                value=self.swap_space_bytes,
                limit=0,
                param="swap_space_bytes",
                remedy="Set enable_prefix_cache=True, or swap_space_bytes=0.",
            )
        for name in ("num_blocks", "kv_memory_bytes", "max_batched_tokens", "max_model_len", "num_threads"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)
        for name in ("max_queued_requests", "max_queued_tokens"):
            if getattr(self, name) not in (None, "auto"):
                _at_least(name, getattr(self, name), 1)
        if self.max_queue_seconds is not None:
            _positive("max_queue_seconds", self.max_queue_seconds)
        for client, weight in (self.client_weights or {}).items():
            _positive(f"client_weights[{client!r}]", weight)
        if self.block_size & (self.block_size - 1) or self.block_size > 256:
            raise ConfigError(
                f"block_size must be a power of two up to 256, got {self.block_size}",
                value=self.block_size,
                limit="1, 2, 4, 8, 16, 32, 64, 128, 256",
                param="block_size",
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EngineConfig:
        """Build from plain values; an unknown key raises instead of being dropped."""
        _refuse_unknown(values, cls, "")
        return cls(**values)


def _refuse_unknown(values: Mapping[str, Any], kind: type[Any], prefix: str) -> None:
    known = {each.name for each in fields(kind)}
    for key in values:
        if key not in known:
            raise ConfigError(
                f"unknown engine setting {prefix}{key!r}",
                value=key,
                limit=sorted(known),
                param=f"{prefix}{key}",
                remedy=f"See engine.{kind.__name__} for the settings that exist.",
            )


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ConfigError(
            f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}",
            value=value,
            limit=allowed,
            param=name,
        )


def _at_least(name: str, value: Any, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ConfigError(
            f"{name} must be an integer of at least {low}, got {value!r}", value=value, limit=low, param=name
        )


def _positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ConfigError(
            f"{name} must be a number above 0, got {value!r}", value=value, limit="> 0", param=name
        )
