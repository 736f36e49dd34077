"""What the outside may see of an engine: deltas of a stream, finished completions, records of steps and requests.

All types here are immutable and picklable; pages, metrics and benchmarks read them and never the engine itself. Times
named ``_ns`` are ``time.monotonic_ns()``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.plan import TokenLogprobs
from engine.request import FinishReason


class StreamDelta(NamedTuple):
    """What one step added to one request. A tuple, because one is made for every token that is read: a frozen dataclass takes
    six times as long to make.

    The engine fills `text` only for requests with stop texts (it must know them); for others the stream's reader
    detokenizes (`engine.worker`), so that the engine thread does not.
    """

    request_id: str
    token_ids: tuple[int, ...]
    text: str | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop text or stop token that ended it
    error: str | None = None
    num_cached_tokens: int = 0
    created_ns: int = 0
    prompt_logprobs: tuple[
        TokenLogprobs, ...
    ] = ()  # in the first delta of a request that asked: prompt tokens 1 … n-1, or from logprob_start_len on
    pooled: NDArray[np.float64] | None = None  # in the last delta of a request that asked


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished request."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    stop_reason: str | int | None
    logprobs: tuple[TokenLogprobs, ...]
    prompt_logprobs: tuple[
        TokenLogprobs, ...
    ]  # when asked for: of prompt tokens 1 … n-1, or from logprob_start_len on
    num_cached_tokens: int
    seed: int
    ttft_ms: float | None  # arrival to first token; None when there was none
    tpot_ms: float | None  # mean time per output token after the first; None below two tokens
    e2e_ms: float
    error: str | None = None
    pooled: NDArray[np.float64] | None = field(
        default=None, compare=False, repr=False
    )  # [hidden], when asked for

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class Cohort:
    """Requests that decode side by side. Steps with the same ones share one object, and what is derived from it."""

    request_ids: tuple[str, ...]
    num_cached_tokens: tuple[int, ...]

    @cached_property
    def rows(self) -> tuple[tuple[str, int], ...]:
        """(request_id, 1) of each, as StepRecord has them."""
        return tuple([(request_id, 1) for request_id in self.request_ids])

    @cached_property
    def index(self) -> dict[str, int]:
        """Each request's place. Asked for where streams are read, not on the engine thread."""
        return {request_id: i for i, request_id in enumerate(self.request_ids)}


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """One token for each request of a cohort and nothing else: what most rows of most steps bring.

    One object a step: whoever wants a StreamDelta of it makes it where the stream is read.
    """

    cohort: Cohort
    token_ids: list[int]
    created_ns: int

    def __len__(self) -> int:
        return len(self.token_ids)

    def delta(self, i: int) -> StreamDelta:
        """The delta of the cohort's i-th request."""
        cohort = self.cohort
        return StreamDelta(
            cohort.request_ids[i],
            (self.token_ids[i],),
            num_cached_tokens=cohort.num_cached_tokens[i],
            created_ns=self.created_ns,
        )

    def delta_of(self, request_id: str) -> StreamDelta:
        """The delta of one request of the cohort."""
        return self.delta(self.cohort.index[request_id])


class BlockEventKind(str, Enum):
    ACQUIRE = "acquire"  # fresh blocks for a request; whatever was cached in them is gone
    SHARE = "share"  # cached or running blocks that a request now also holds
    PUBLISH = "publish"  # blocks that became matchable
    RELEASE = "release"  # the request gave up all its blocks (block_ids is empty)


class BlockEvent(NamedTuple):
    kind: BlockEventKind
    request_id: str
    block_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class BlockKeyframe:
    """The whole ownership at one step, from which the deltas count on. Made in O(requests), read in O(blocks)."""

    # request_id -> its block table, and how many blocks it had then: a table only grows, and this one may have since.
    tables: dict[str, tuple[Sequence[int], int]]
    matchable: bytes  # one bit a block (`numpy.packbits`): whether it was matchable, owned or not

    @property
    def owners(self) -> dict[str, tuple[int, ...]]:
        """request_id -> its block table."""
        return {request_id: tuple(table[:length]) for request_id, (table, length) in self.tables.items()}

    @property
    def published(self) -> frozenset[int]:
        """Matchable blocks, owned or not."""
        bits = np.unpackbits(np.frombuffer(self.matchable, np.uint8))
        return frozenset(np.flatnonzero(bits).tolist())


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step as it happened. Appended by the engine thread, read by anyone."""

    step_id: int
    started_ns: int
    ended_ns: int
    schedule_ms: float
    prepare_ms: float
    forward_ms: float
    sample_ms: float
    rows: tuple[tuple[str, int], ...]  # (request_id, num_tokens) in row order
    num_prefill_tokens: int
    num_decode_tokens: int
    num_waiting: int
    num_running: int
    num_free_blocks: int  # free and cached: what can be allocated
    num_cached_blocks: int  # matchable among them
    preempted: tuple[str, ...] = ()
    prefix_hits: tuple[tuple[str, int], ...] = ()  # (request_id, cached tokens) of rows admitted in this step
    finished: tuple[str, ...] = ()
    block_events: tuple[BlockEvent, ...] = ()
    keyframe: BlockKeyframe | None = None  # every 256 steps: ownership AFTER this step's events
    graph_size: int = 0
    bytes_needed: int = 0
    flops_needed: int = 0
    weight_bytes: int = 0  # of bytes_needed; the others are of keys and values
    attention_flops: int = 0  # of flops_needed: with keys and values; the others are with weights
    error: str | None = None
    num_blocks_out: int = 0  # copied to the host tier before they were reused
    num_blocks_back: int = 0  # copied from there instead of being computed
    num_draft_tokens: int = 0  # guesses that were computed
    num_accepted_tokens: int = 0  # those of them that were right


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One finished request's figures (no text)."""

    request_id: str
    arrival_ns: int
    admitted_ns: int | None
    first_token_ns: int | None
    finished_ns: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    num_preemptions: int
    finish_reason: FinishReason
    token_ns: tuple[int, ...] = ()  # when each output token was committed
    error: str | None = None
    num_draft_tokens: int = 0  # guessed for it
    num_accepted_tokens: int = 0  # rightly
    grammar_compile_ms: float = 0.0  # before arrival; 0 where there is no grammar, or a cached one
    lora: str | None = None  # the name of the adapter that computed it
    client: str = ""  # whom it counted for
    priority: int = 0  # lower runs earlier


@dataclass(frozen=True, slots=True)
class EngineEvent:
    """Something worth telling that is not a step: started, stopped, step failed, dead."""

    kind: str
    at_ns: int
    message: str = ""
    request_ids: tuple[str, ...] = ()
    loras: tuple[str | None, ...] = ()  # of `request_ids`, where these ended without a record of their own


@dataclass(frozen=True, slots=True)
class MemoryLedger:
    """Bytes by purpose on the engine's device."""

    weights_bytes: int  # as they are held: packed, in another dtype, with the rotary tables
    kv_bytes: int
    workspace_bytes: int  # the most that a step needs beside them: measured on a GPU, estimated on a CPU
    total_bytes: int  # what the device has
    device: str
    graphs_bytes: int = 0  # captured graphs
    other_bytes: int = 0  # what was taken before this engine was built: other processes, other engines
    host_tier_bytes: int = 0  # KV blocks in host memory, which on a CPU is the device's own

    @property
    def engine_bytes(self) -> int:
        """What this engine takes of the device in all."""
        own = self.weights_bytes + self.kv_bytes + self.workspace_bytes + self.graphs_bytes
        return own + self.host_tier_bytes if self.device == "cpu" else own

    @property
    def free_bytes(self) -> int:
        """What the device has left beside this engine and the others."""
        return max(0, self.total_bytes - self.engine_bytes - self.other_bytes)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since start and gauges of now."""

    model: str
    version_digest: str
    num_waiting: int
    num_running: int
    num_blocks: int
    num_free_blocks: int
    num_cached_blocks: int
    block_size: int
    max_num_seqs: int
    max_model_len: int
    max_batched_tokens: int
    steps: int
    step_errors: int
    prompt_tokens: int
    output_tokens: int
    cached_prompt_tokens: int
    preemptions: int
    finished: dict[str, int] = field(default_factory=dict)  # by FinishReason value
    memory: MemoryLedger | None = None
    dtype: str = ""
    device: str = ""
    kv_cache_dtype: str = ""
    attention_backend: str = ""
    deterministic: bool = False
    is_proven_deterministic: bool | None = None  # by the needle test on this device; None: not in that mode
    is_sleeping: bool = False  # weights and KV cache are given back; no requests until it wakes up
    num_host_blocks: int = 0  # that the host tier can keep
    num_cached_host_blocks: int = 0  # that it keeps: matchable
    blocks_out: int = 0  # copied to the host tier
    blocks_back: int = 0  # copied from it
    num_waiting_tokens: int = 0  # of what waits for a row
    speculation_method: str = ""  # where guesses come from: "ngram", "draft_model"; empty: nothing is guessed
    draft_tokens: int = 0  # guesses that were computed
    accepted_tokens: int = 0  # those of them that were right
    # Tokens a second with guesses over those without, by the number of rows (a power of two), where both were measured.
    speculation_gains: dict[int, float] = field(default_factory=dict)


class HealthState(str, Enum):
    STARTING = "starting"
    HEALTHY = "healthy"  # idle, or a step succeeded lately
    STALLED = "stalled"  # work is waiting and no step succeeded for too long
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class Health:
    state: HealthState
    last_step_ns: int | None
    message: str = ""

    @property
    def ok(self) -> bool:
        return self.state is HealthState.HEALTHY


class Sink(Protocol):
    """Receives every record, losslessly, on the engine thread: be quick, never block."""

    def on_step(self, record: StepRecord) -> None: ...

    def on_request(self, record: RequestRecord) -> None: ...

    def on_event(self, event: EngineEvent) -> None: ...
