"""Engine: one model's scheduler and runner, driven step by step; deterministic given its inputs.

``step()`` plans and submits the next step while earlier ones run on the device, then takes in the oldest one once
`runner.max_inflight` steps are in flight. A step that fails takes its own requests with it; the others are recomputed and
go on. A broken device takes the engine.

Boundary: no thread, no queue, no history (``engine.worker``, ``engine.record_log``); text only where a stop text asks for it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from engine import admission
from engine.admission import Limits
from engine.bad_words import with_bad_word_ids
from engine.cache.block_pool import BlockPool
from engine.cache.host_tier import HostTier
from engine.cache.sequence_blocks import SequenceBlocks
from engine.config import EngineConfig
from engine.errors import (
    ConfigError,
    EngineAsleepError,
    EngineBusyError,
    EngineDeadError,
    InvalidRequestError,
)
from engine.grammar import Compiled, GrammarCompiler
from engine.lora import Lora, LoraRegistry, LoraStore, LoraWeights
from engine.outbox import Outbox
from engine.plan import KVSpec, Runner, StepResult
from engine.planned_step import PlannedStep
from engine.pooling import ModelPooling
from engine.queue_deadlines import QueueDeadlines
from engine.queue_limit import Backlog
from engine.recording import Recorder, StepTiming
from engine.records import EngineStats, MemoryLedger, RequestRecord, StepRecord, StreamDelta, TokenBatch
from engine.request import FinishReason, Request
from engine.request import Sequence as RequestSequence
from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler
from engine.speculation import Speculator
from engine.tokenizer import TokenizerLike


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one call of ``Engine.step`` gave to the outside."""

    tokens: TokenBatch | None = None  # what the step brought to requests that got a token and nothing else
    others: tuple[StreamDelta, ...] = ()  # what came to the others; no request is in both
    record: StepRecord | None = None  # of the step taken in by this call, if there was one
    requests: tuple[RequestRecord, ...] = ()  # those that ended

    @property
    def deltas(self) -> tuple[StreamDelta, ...]:
        """All that came, a delta for each request that got something. Made anew by each call."""
        tokens = self.tokens
        return self.others if tokens is None else (*map(tokens.delta, range(len(tokens))), *self.others)


class Engine:
    """Runs requests on one model. Not thread-safe, but for `make_request` and `stats`.

    Args:
        config: resolved: no value of it is None that a step needs.
        kv_spec: the KV cache that the runner holds.
        memory: bytes by purpose, passed on to `stats`.
        lora_store: holds the adapters of the runner; None: the engine takes none.
        is_proven_deterministic: what the needle test said of this runner, passed on likewise.
        pooling: how the model was trained to embed; None: as a chat model.

    Raises:
        ConfigError: a setting is unresolved or contradicts the runner's cache.
    """

    def __init__(
        self,
        config: EngineConfig,
        runner: Runner,
        *,
        kv_spec: KVSpec,
        eos_token_ids: frozenset[int],
        vocab_size: int,
        tokenizer: TokenizerLike | None = None,
        memory: MemoryLedger | None = None,
        lora_store: LoraStore | None = None,
        is_proven_deterministic: bool | None = None,
        pooling: ModelPooling | None = None,
    ) -> None:
        if kv_spec.block_size != config.block_size:
            raise ConfigError(
                f"block_size is {config.block_size}, the runner's cache has {kv_spec.block_size}",
                value=config.block_size,
                limit=kv_spec.block_size,
                param="block_size",
            )
        num_blocks = _resolved("num_blocks", config.num_blocks)
        max_model_len = _resolved("max_model_len", config.max_model_len)
        max_batched_tokens = _resolved("max_batched_tokens", config.max_batched_tokens)
        self.config = config
        self.tokenizer = tokenizer
        self.pooling = pooling or ModelPooling()
        self._runner = runner
        self._memory = memory
        self._is_proven_deterministic = is_proven_deterministic
        self._limits = Limits(
            max_model_len, num_blocks * config.block_size, vocab_size, tokenizer is not None
        )
        self._seeds = Random(config.seed)
        self.grammars = GrammarCompiler(tokenizer, vocab_size=vocab_size, eos_token_ids=eos_token_ids)
        num_slots = kv_spec.num_blocks_in(config.swap_space_bytes)
        blocks = SequenceBlocks(
            BlockPool(num_blocks, HostTier(num_slots) if num_slots else None),
            config.block_size,
            version_digest=config.version_digest,
            enable_prefix_cache=config.enable_prefix_cache,
        )
        speculative = config.speculative_config
        self._speculator = Speculator(speculative, config.block_size) if speculative is not None else None
        # What follows wrong guesses is known only when a step was taken in.
        self._max_inflight = runner.max_inflight if speculative is None else 1
        self._scheduler = Scheduler(
            blocks,
            max_batched_tokens=max_batched_tokens,
            max_num_seqs=config.max_num_seqs,
            eos_token_ids=eos_token_ids,
            max_loras=config.max_loras,
            client_weights=config.client_weights,
            speculator=self._speculator,
        )
        self._deadlines = QueueDeadlines(
            config.max_queue_seconds, get=self._scheduler.request, has_begun=self._scheduler.has_begun
        )
        self._loras = LoraRegistry(lora_store, self._scheduler.loras.num_live)
        self._recorder = Recorder(self._scheduler)
        self._outbox = Outbox(self._recorder)
        self._timings: deque[StepTiming] = deque()  # of the steps in flight
        self._submit_error: Exception | None = None  # of the newest step in flight
        self._dead: str | None = None
        self.on_lost: Callable[[EngineDeadError], None] | None = (
            None  # told of `lost`, on the thread that calls it
        )
        self._sleep_level = 0  # 0: awake

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
        """A checked request with its seed drawn; it is not queued yet. Safe to call from any thread.

        `lora`: the name of a loaded adapter; None: the base alone. `compiled`: what ``grammars.grammar_of(params)`` gave; None: it is
        asked here. `priority`: lower runs earlier. `client`: who gets a fair share of what others get too. `timeout_s`: since
        `arrival_ns`, when it ends with TIMEOUT, whether it runs or waits; None: it may take what it takes.

        Raises:
            InvalidRequestError, PromptTooLongError: naming value, limit and remedy.
            EngineAsleepError: it was put to sleep.
            EngineDeadError: nothing can be run any more.
        """
        self._require_awake()
        return admission.make_request(
            prompt_token_ids, with_bad_word_ids(params, self.tokenizer), self._limits, self._seeds, request_id=request_id,
            cache_salt=cache_salt, lora=None if lora is None else self._loras.get(lora), arrival_ns=arrival_ns,
            compiled=compiled or self.grammars.grammar_of(params), priority=priority, client=client,
            timeout_s=timeout_s,
        )  # fmt: skip

    def add(self, request: Request) -> None:
        """Queue a request made by `make_request`.

        Raises:
            InvalidRequestError: its id belongs to a request that has not ended, or its adapter was removed meanwhile.
            EngineAsleepError: it was put to sleep.
            EngineDeadError: nothing can be run any more.
        """
        self._require_awake()
        if request.request_id in self._outbox:
            raise InvalidRequestError(
                f"request id {request.request_id!r} is in use",
                value=request.request_id,
                remedy="Use an id of its own for each request.",
                param="request_id",
            )
        if request.lora is not None and not self._loras.is_loaded(request.lora):
            raise InvalidRequestError(
                f"adapter {request.lora.name!r} was removed before the request came to run",
                value=request.lora.name,
                remedy="Load it again.",
                param="lora",
            )
        detokenizer = None
        if request.params.stop:
            assert self.tokenizer is not None, "stop texts were admitted without a tokenizer"
            detokenizer = self.tokenizer.detokenizer(request.params.skip_special_tokens)
        self._outbox.open(request, detokenizer)
        self._scheduler.add(admission.make_sequence(request, self._limits))
        self._deadlines.add(request)

    def abort(self, request_id: str, reason: str | None = None) -> None:
        """End a request now; its last delta, with `reason`, comes with the next step. An id that is not live is ignored."""
        seq = self._scheduler.abort(request_id)
        if seq is not None:
            self._outbox.put_end(seq, FinishReason.ABORT, reason, time.monotonic_ns())

    def _end_overdue(self) -> None:
        """End requests that have waited for their turn for too long, or whose deadline is over."""
        now_ns = time.monotonic_ns()
        for overdue in self._deadlines.take_overdue(now_ns):
            seq = self._scheduler.get(overdue.request_id)
            assert seq is not None, f"{overdue.request_id} is overdue and has ended"
            self._scheduler.finish(seq, FinishReason.TIMEOUT)
            self._outbox.put_end(seq, FinishReason.TIMEOUT, overdue.why, now_ns)

    @property
    def backlog(self) -> Backlog:
        """What waits for a row. Safe to call from any thread."""
        waiting = self._scheduler.waiting
        return Backlog(len(waiting), waiting.num_tokens)

    @property
    def vocab_size(self) -> int:
        """Tokens of the model's output; ids are below it."""
        return self._limits.vocab_size

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do or to hand out."""
        return self._scheduler.has_work or not self._outbox.is_empty

    # ── adapters ────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def loras(self) -> tuple[Lora, ...]:
        """The adapters that requests may name, oldest first. Safe to call from any thread."""
        return self._loras.loaded

    def read_lora(self, folder: str | Path) -> LoraWeights:
        """Read a PEFT LoRA folder and check it against the model; nothing changes. Safe to call from any thread.

        Raises:
            InvalidRequestError: the engine was built without `enable_lora`.
            ModelLoadError: the adapter cannot be loaded on this model: value, limit and remedy.
            OutOfMemoryError: the host has fewer bytes.
            EngineDeadError: nothing can be run any more.
        """
        self._require_alive()
        return self._loras.read(folder)

    def add_lora(self, name: str, source: str | Path | LoraWeights) -> Lora:
        """Load an adapter, from its folder or from what `read_lora` gave: requests may name it from now on.

        Raises:
            InvalidRequestError, ModelLoadError, OutOfMemoryError, EngineDeadError: as `read_lora`, or the name is in use.
        """
        self._require_alive()
        return self._loras.add(name, self.read_lora(source) if isinstance(source, str | Path) else source)

    def remove_lora(self, name: str) -> None:
        """Unload an adapter: its name is free at once. Requests that carry it run to their end, then its memory is given back.

        Raises:
            InvalidRequestError: no adapter of that name is loaded.
        """
        self._loras.remove(name)

    # ── steps ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def step(self) -> StepOutput:
        """Plan and submit one step, then take in the oldest if enough are in flight or nothing can be planned.

        Raises:
            EngineDeadError: the device is broken; every live request is lost, and so is the engine.
        """
        self._require_alive()
        self._end_overdue()
        planned = self._submit_error is None and self._submit_next()
        inflight = len(self._scheduler.inflight)
        record = None
        if inflight and (not planned or inflight >= self._max_inflight):
            record = self._take_oldest()
        elif not inflight and self._scheduler.blocks.events:
            record = self._record_idle()
        self._loras.let_go()
        tokens, others, requests = self._outbox.take()
        return StepOutput(tokens, others, record, requests)

    def _submit_next(self) -> bool:
        """Plan and submit. False if nothing could be planned or the runner refused the step."""
        started_ns = time.monotonic_ns()
        plan = self._scheduler.plan()
        if plan is None:
            return False
        self._timings.append(StepTiming(started_ns, time.monotonic_ns() - started_ns))
        for seq in self._scheduler.inflight[-1].admitted:
            self._outbox.admitted(seq, started_ns)
        try:
            self._runner.submit(plan)
        except EngineDeadError as error:
            self._die(error)
            raise
        except Exception as error:  # noqa: BLE001 - the step boundary: it fails when its turn to be taken in comes
            self._submit_error = error
            return False
        return True

    def _take_oldest(self) -> StepRecord:
        """Collect and commit the oldest step in flight, or fail it."""
        step = self._scheduler.inflight[0]
        timing = self._timings.popleft()
        try:
            result = self._collect()
        except EngineDeadError as error:
            self._die(error)
            raise
        except Exception as error:  # noqa: BLE001 - the step boundary: recorded with its requests
            return self._fail(step, timing, error)
        collected_ns = time.monotonic_ns()
        failed = self._end_dead_ends(step, result, collected_ns)
        commit = self._scheduler.commit(result)
        now_ns = time.monotonic_ns()
        timing.schedule_ns += now_ns - collected_ns
        if self._speculator is not None:
            self._speculator.observe(step, len(commit.token_ids), (collected_ns - timing.started_ns) / 1e9)
        stopped = self._outbox.put_commit(commit, now_ns)
        for seq in stopped:
            self._scheduler.finish(seq, FinishReason.STOP)
        ended = (*failed, *(finish.seq for finish in commit.finished), *stopped)
        finished = tuple(seq.request_id for seq in ended)
        return self._recorder.step(
            step, timing, now_ns, result, finished=finished, num_accepted_tokens=commit.num_accepted_tokens
        )

    def _end_dead_ends(self, step: PlannedStep, result: StepResult, now_ns: int) -> list[RequestSequence]:
        """End the requests for which no token was possible; what stands there as their token is not taken."""
        if not result.dead_ends:
            return []
        sampling = step.sampling()
        lost: list[RequestSequence] = []
        for j, why in result.dead_ends.items():
            seq = sampling[j]
            if seq in step.dropped:
                continue  # ended before, perhaps here: guesses give one request several tokens
            lost.append(seq)
            held = seq.block_ids
            self._scheduler.finish(seq, FinishReason.ERROR)
            if result.token_ids[j] < 0:
                self._scheduler.blocks.withdraw(held)
            self._outbox.put_end(seq, FinishReason.ERROR, why, now_ns)
        return lost

    def _collect(self) -> StepResult:
        if self._submit_error is not None and len(self._scheduler.inflight) == 1:
            raise self._submit_error
        return self._runner.collect()

    def _record_idle(self) -> StepRecord:
        """A record without rows: blocks were given back while no step was in flight."""
        now_ns = time.monotonic_ns()
        step = PlannedStep(self._scheduler.take_step_id())
        return self._recorder.step(step, StepTiming(now_ns, 0), now_ns)

    # ── failure ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _fail(self, step: PlannedStep, timing: StepTiming, error: Exception) -> StepRecord:
        """End the requests of a failed step; put the others back to be recomputed."""
        message = f"step {step.step_id} failed: {type(error).__name__}: {error}"
        self._submit_error = None
        self._timings.clear()
        lost = self._scheduler.fail(step)
        try:
            self._runner.reset_rows()
        except Exception as reset_error:
            self._die(reset_error)
            raise EngineDeadError(f"the device did not recover after {message}") from reset_error
        now_ns = time.monotonic_ns()
        for seq in lost:
            self._outbox.put_end(seq, FinishReason.ERROR, message, now_ns)
        finished = tuple(seq.request_id for seq in lost)
        return self._recorder.step(step, timing, now_ns, finished=finished, error=message)

    def lost(self, error: EngineDeadError) -> None:
        """To be called, from any thread, when the runner is gone while perhaps nothing runs: the next step raises."""
        if self._dead is None:
            self._die(error)
            if self.on_lost is not None:
                self.on_lost(error)

    def _die(self, error: Exception) -> None:
        self._dead = f"{type(error).__name__}: {error}"

    def _require_alive(self) -> None:
        if self._dead is not None:
            raise EngineDeadError(
                f"the engine takes no requests any more ({self._dead})", remedy="Restart it."
            )

    def _require_awake(self) -> None:
        self._require_alive()
        if self._sleep_level:
            raise EngineAsleepError("the engine sleeps", remedy="Call wake_up() first.")

    # ── sleep ───────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def is_sleeping(self) -> bool:
        return self._sleep_level > 0

    def sleep(self, level: int = 1) -> None:
        """Give the device's memory back until `wake_up`; the prefix cache is emptied. Asleep already: nothing happens.

        Level 1 discards the KV cache and keeps the weights in host memory (pinned beside a GPU; on a CPU they are where
        they were). Level 2 discards both, and `wake_up` loads the weights again. Levels and names are vLLM's.

        Raises:
            EngineBusyError: there are requests; let them end, or abort them.
            ConfigError: another level.
            EngineDeadError: nothing can be run any more.
        """
        self._require_alive()
        if level not in (1, 2):
            raise ConfigError(f"there is no sleep level {level!r}", value=level, limit="1, 2", param="level")
        if self.has_work:
            num_live = len(self._outbox.request_ids)
            raise EngineBusyError(
                f"the engine cannot sleep with {num_live} requests", value=num_live, limit=0,
                remedy="Let them end, or abort them.",
            )  # fmt: skip
        if not self._sleep_level:
            self._on_device(lambda: self._runner.sleep(level))
            self._scheduler.blocks.forget()
            if self._speculator is not None:
                self._speculator.forget_blocks()
            self._sleep_level = level

    def wake_up(self) -> None:
        """Take requests again. Awake already: nothing happens. If it raises, the engine sleeps on, unless it died.

        Raises:
            OutOfMemoryError: the device does not have the memory any more.
            ModelLoadError: the weights' files are not what they were.
            EngineDeadError: the device is broken, or the engine closed.
        """
        self._require_alive()
        if self._sleep_level:
            self._on_device(self._runner.wake_up)
            self._sleep_level = 0

    def _on_device(self, call: Callable[[], None]) -> None:
        try:
            call()
        except EngineDeadError as error:
            self._die(error)
            raise

    # ── from outside ────────────────────────────────────────────────────────────────────────────────────────────────

    def stats(self) -> EngineStats:
        """Counters since start and gauges of now. O(1); safe to call from any thread."""
        config, scheduler, recorder, limits = self.config, self._scheduler, self._recorder, self._limits
        pool = scheduler.blocks.pool
        return EngineStats(
            model=config.model,
            version_digest=config.version_digest,
            num_waiting=len(scheduler.waiting),
            num_waiting_tokens=scheduler.waiting.num_tokens,
            num_running=len(scheduler.running),
            num_blocks=pool.num_blocks,
            num_free_blocks=pool.num_free,
            num_cached_blocks=pool.num_cached,
            num_host_blocks=0 if pool.tier is None else pool.tier.num_slots,
            num_cached_host_blocks=0 if pool.tier is None else pool.tier.num_cached,
            blocks_out=recorder.num_blocks_out,
            blocks_back=recorder.num_blocks_back,
            speculation_method="" if config.speculative_config is None else config.speculative_config.method,
            draft_tokens=0 if self._speculator is None else self._speculator.num_draft_tokens,
            accepted_tokens=0 if self._speculator is None else self._speculator.num_accepted_tokens,
            speculation_gains={} if self._speculator is None else self._speculator.gains(),
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_model_len=limits.max_model_len,
            max_batched_tokens=scheduler.max_batched_tokens,
            steps=recorder.num_steps,
            step_errors=recorder.num_step_errors,
            prompt_tokens=recorder.num_prompt_tokens,
            output_tokens=recorder.num_output_tokens,
            cached_prompt_tokens=recorder.num_cached_prompt_tokens,
            preemptions=scheduler.num_preemptions,
            finished=dict(recorder.num_finished),
            memory=self._ledger(),
            is_sleeping=self.is_sleeping,
            dtype=config.dtype,
            device=config.device,
            kv_cache_dtype=config.kv_cache_dtype,
            attention_backend=config.attention_backend,
            deterministic=config.deterministic,
            is_proven_deterministic=self._is_proven_deterministic,
        )

    def _ledger(self) -> MemoryLedger | None:
        memory = self._memory
        if memory is None or not self._sleep_level:
            return memory
        # Where the host's memory is the device's, weights that are kept there are still there.
        is_there = self._sleep_level == 1 and self.config.device == "cpu"
        return replace(
            memory, weights_bytes=memory.weights_bytes if is_there else 0, kv_bytes=0, graphs_bytes=0,
            host_tier_bytes=0,
        )  # fmt: skip

    def check_integrity(self) -> None:
        """Prove the accounting of rows, blocks and tokens. O(blocks + live tokens).

        Raises:
            AssertionError: naming what does not hold.
        """
        self._scheduler.check_integrity()
        live = {seq.request_id for seq in self._scheduler.sequences()}
        assert live == self._outbox.request_ids, f"followed {self._outbox.request_ids}, live {live}"
        assert len(self._timings) == len(self._scheduler.inflight), "a step in flight without its timing"

    def close(self) -> None:
        """Give the device's memory back. Live requests are lost. A second call does nothing."""
        if self._dead is None:
            self._dead = "closed"
        self.grammars.close()
        self._runner.close()


def _resolved(name: str, value: int | None) -> int:
    if value is None:
        raise ConfigError(
            f"{name} is not resolved",
            value=None,
            param=name,
            remedy="Resolve it with engine.build.resolve_config.",
        )
    return value
