"""EncoderEngine: the engine of an encoder, stepped by the same worker as others: a step is one batch of whole texts.

The oldest text that waits is in the next batch; those nearest to it in length share it, as many as the token budget holds with
their padding. Requests of all callers wait together. A batch that fails takes its own requests with it.

Boundary: queue, batches, records. What a batch computes is behind `Encoder` (``engine.encoder.model``); nothing here imports torch.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from random import Random
from typing import Protocol

from engine import admission
from engine.admission import Limits
from engine.config import EngineConfig
from engine.engine import Engine, StepOutput
from engine.errors import ConfigError, EngineDeadError, InvalidRequestError
from engine.grammar import Compiled, GrammarCompiler
from engine.lora import Lora, LoraWeights
from engine.pooling import ModelPooling, Pooling, Vector
from engine.queue_deadlines import QueueDeadlines
from engine.queue_limit import Backlog
from engine.records import EngineStats, MemoryLedger, RequestRecord, StepRecord, StreamDelta
from engine.request import FinishReason, Request
from engine.sampling_params import SamplingParams
from engine.tokenizer import TokenizerLike

LOOK_AHEAD = 1024  # waiting texts among which those of like length are found: bounds what a step may cost


class Encoder(Protocol):
    """The model on its device."""

    def encode(self, texts: Sequence[Sequence[int]], poolings: Sequence[Pooling]) -> list[Vector]:
        """One vector for each text of a batch."""
        ...


class EncoderEngine(Engine):
    """Runs requests with `pooling` on one encoder. Not thread-safe, but for `make_request` and `stats`.

    It has no scheduler and no KV blocks, hence none of its base class's state: every public member is here.
    """

    def __init__(
        self,
        config: EngineConfig,
        encoder: Encoder,
        *,
        pooling: ModelPooling,
        vocab_size: int,
        tokenizer: TokenizerLike | None,
        memory: MemoryLedger | None = None,
    ) -> None:
        assert config.max_model_len is not None, "the config is not resolved"
        assert config.max_batched_tokens is not None, "the config is not resolved"
        self.config = config
        self.tokenizer = tokenizer
        self.pooling = pooling
        self.grammars = GrammarCompiler(None, vocab_size=vocab_size, eos_token_ids=frozenset())
        self._encoder: Encoder | None = encoder
        self._memory = memory
        self._limits = Limits(
            config.max_model_len, config.max_model_len, vocab_size, tokenizer is not None, pooling.poolings
        )
        self._budget, self._most = config.max_batched_tokens, config.max_num_seqs
        self._seeds = Random(config.seed)
        self._waiting: dict[str, Request] = {}  # oldest first
        self._deadlines = QueueDeadlines(
            config.max_queue_seconds, get=self._waiting.get, has_begun=lambda request: False
        )
        self._deltas: list[StreamDelta] = []
        self._records: list[RequestRecord] = []
        self._num_waiting_tokens = 0
        self._finished: Counter[str] = Counter()
        self._num_steps = self._num_errors = self._num_tokens = 0

    # ── requests ────────────────────────────────────────────────────────────────────────────────────────────────────

    def make_request(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        cache_salt: str = "",
        lora: str | None = None,
        arrival_ns: int | None = None,
        compiled: Compiled | None = None,
        priority: int = 0,
        client: str = "",
        timeout_s: float | None = None,
    ) -> Request:
        """A checked request; it is not queued yet. Safe to call from any thread.

        Raises:
            InvalidRequestError, PromptTooLongError: naming value, limit and remedy.
            EngineDeadError: nothing can be run any more.
        """
        self._require_open()
        if params.pooling is None:
            self.pooling.require_generation()
        if lora is not None:
            raise self._no_adapters(lora)
        return admission.make_request(
            prompt_token_ids, params, self._limits, self._seeds, request_id=request_id, cache_salt=cache_salt,
            arrival_ns=arrival_ns, priority=priority, client=client, timeout_s=timeout_s,
        )  # fmt: skip

    def add(self, request: Request) -> None:
        """Queue a request made by `make_request`."""
        self._require_open()
        if request.request_id in self._waiting:
            raise InvalidRequestError(
                f"request id {request.request_id!r} is in use", value=request.request_id, param="request_id",
                remedy="Use an id of its own for each request.",
            )  # fmt: skip
        self._waiting[request.request_id] = request
        self._num_waiting_tokens += len(request.prompt_token_ids)
        self._deadlines.add(request)

    def abort(self, request_id: str, reason: str | None = None) -> None:
        """End a request that waits; its last delta comes with the next step. Others are ignored."""
        request = self._waiting.pop(request_id, None)
        if request is not None:
            self._end(request, FinishReason.ABORT, time.monotonic_ns(), error=reason)

    @property
    def backlog(self) -> Backlog:
        """What waits for a batch. Safe to call from any thread."""
        return Backlog(len(self._waiting), self._num_waiting_tokens)

    @property
    def vocab_size(self) -> int:
        return self._limits.vocab_size

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._deltas)

    # ── steps ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def step(self) -> StepOutput:
        """Compute one batch of what waits, and hand out what has ended."""
        self._require_open()
        self._end_overdue()
        record = self._run(self._next_batch()) if self._waiting else None
        output = StepOutput(None, tuple(self._deltas), record, tuple(self._records))
        self._deltas.clear()
        self._records.clear()
        return output

    def _end_overdue(self) -> None:
        """End requests that have waited for too long, or whose deadline is over."""
        now_ns = time.monotonic_ns()
        for overdue in self._deadlines.take_overdue(now_ns):
            request = self._waiting.pop(overdue.request_id)
            self._end(request, FinishReason.TIMEOUT, now_ns, error=overdue.why)

    def _next_batch(self) -> list[Request]:
        """The oldest request and those nearest to it in length, within the budget; they wait no more."""
        if self.config.deterministic:  # nothing shares a batch
            return [self._waiting.pop(next(iter(self._waiting)))]
        candidates = list(islice(self._waiting.values(), LOOK_AHEAD))
        size = len(candidates[0].prompt_token_ids)
        nearest = sorted(candidates, key=lambda request: abs(len(request.prompt_token_ids) - size))
        batch: list[Request] = []
        longest = 0
        for request in nearest[: self._most]:
            longest = max(longest, len(request.prompt_token_ids))
            if batch and (len(batch) + 1) * longest > self._budget:
                break
            batch.append(self._waiting.pop(request.request_id))
        return batch

    def _run(self, batch: list[Request]) -> StepRecord:
        assert self._encoder is not None
        started_ns = time.monotonic_ns()
        texts = [request.prompt_token_ids for request in batch]
        error, vectors = None, []
        try:
            vectors = self._encoder.encode(texts, [_pooling_of(request) for request in batch])
        except Exception as raised:  # noqa: BLE001 - the step boundary: recorded with its requests
            error = f"step {self._num_steps} failed: {type(raised).__name__}: {raised}"
        ended_ns = time.monotonic_ns()
        for i, request in enumerate(batch):
            if error is None:
                self._end(request, FinishReason.LENGTH, ended_ns, started_ns, pooled=vectors[i])
            else:
                self._end(request, FinishReason.ERROR, ended_ns, started_ns, error=error)
        num_tokens = sum(map(len, texts))
        self._num_steps += 1
        self._num_errors += error is not None
        self._num_tokens += num_tokens
        return StepRecord(
            step_id=self._num_steps - 1, started_ns=started_ns, ended_ns=ended_ns, schedule_ms=0.0, prepare_ms=0.0,
            forward_ms=(ended_ns - started_ns) / 1e6, sample_ms=0.0,
            rows=tuple((request.request_id, len(request.prompt_token_ids)) for request in batch),
            num_prefill_tokens=num_tokens, num_decode_tokens=0, num_waiting=len(self._waiting), num_running=0,
            num_free_blocks=0, num_cached_blocks=0, finished=tuple(request.request_id for request in batch), error=error,
        )  # fmt: skip

    def _end(
        self,
        request: Request,
        reason: FinishReason,
        now_ns: int,
        admitted_ns: int | None = None,
        *,
        pooled: Vector | None = None,
        error: str | None = None,
    ) -> None:
        self._deltas.append(
            StreamDelta(request.request_id, (), "", (), reason, error=error, created_ns=now_ns, pooled=pooled)
        )
        self._records.append(
            RequestRecord(
                request_id=request.request_id,
                arrival_ns=request.arrival_ns,
                admitted_ns=admitted_ns,
                first_token_ns=None,
                finished_ns=now_ns,
                num_prompt_tokens=len(request.prompt_token_ids),
                num_cached_tokens=0,
                num_output_tokens=0,
                num_preemptions=0,
                finish_reason=reason,
                error=error,
                client=request.client,
            )
        )
        self._finished[reason.value] += 1
        self._num_waiting_tokens -= len(request.prompt_token_ids)

    # ── what encoders do not have ───────────────────────────────────────────────────────────────────────────────────

    @property
    def loras(self) -> tuple[Lora, ...]:
        return ()

    def read_lora(self, folder: str | Path) -> LoraWeights:
        """Raises: InvalidRequestError."""
        raise self._no_adapters(str(folder))

    def add_lora(self, name: str, source: str | Path | LoraWeights) -> Lora:
        """Raises: InvalidRequestError."""
        raise self._no_adapters(name)

    def remove_lora(self, name: str) -> None:
        """Raises: InvalidRequestError."""
        raise self._no_adapters(name)

    def _no_adapters(self, value: str) -> InvalidRequestError:
        return InvalidRequestError(
            "this model is an encoder and takes no adapters", value=value, param="lora",
            remedy="Merge the adapter into the model's weights.",
        )  # fmt: skip

    @property
    def is_sleeping(self) -> bool:
        return False

    def sleep(self, level: int = 1) -> None:
        """Raises: ConfigError."""
        raise ConfigError(
            "an encoder does not sleep", value=level, limit=0, param="level", remedy="Unload it, and load it again later."
        )  # fmt: skip

    def wake_up(self) -> None:
        """It is awake."""

    # ── from outside ────────────────────────────────────────────────────────────────────────────────────────────────

    def stats(self) -> EngineStats:
        """Counters since start and gauges of now; it has no KV blocks. Safe to call from any thread."""
        config = self.config
        return EngineStats(
            model=config.model, version_digest=config.version_digest, num_waiting=len(self._waiting), num_running=0,
            num_blocks=0, num_free_blocks=0, num_cached_blocks=0, block_size=config.block_size,
            max_num_seqs=config.max_num_seqs, max_model_len=self._limits.max_model_len, max_batched_tokens=self._budget,
            steps=self._num_steps, step_errors=self._num_errors, prompt_tokens=self._num_tokens, output_tokens=0,
            cached_prompt_tokens=0, preemptions=0, finished=dict(self._finished), memory=self._memory, dtype=config.dtype,
            device=config.device, deterministic=config.deterministic,
        )  # fmt: skip

    def check_integrity(self) -> None:
        """Nothing is accounted for but the queue."""

    def close(self) -> None:
        """Give the memory back. A second call does nothing."""
        self._encoder = None
        self.grammars.close()

    def _require_open(self) -> None:
        if self._encoder is None:
            raise EngineDeadError("the engine takes no requests any more (closed)", remedy="Restart it.")


def _pooling_of(request: Request) -> Pooling:
    assert request.params.pooling is not None, "admitted without one"
    return request.params.pooling
