"""ModelRunner: executes step plans on one device.

A step is: take over the plan's deltas, build the flat inputs, run the decoder, sample, write the sampled tokens into the
row buffers, start one copy to the host. On a GPU nothing here waits for the device but `collect`, so that a second step
can be submitted while the first runs, and steps that only decode are replayed graphs; on a CPU a step has run when
`submit` returns.

Boundary: implements ``engine.plan.Runner``; no scheduling, no block accounting, no stop rules, no text.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from engine.attention.interface import AttentionBackend, CapturableAttention
from engine.config import EngineConfig
from engine.errors import ConfigError, EngineDeadError, OutOfMemoryError
from engine.kernels.kv_quantization import QUANTIZED_DTYPES, cache_dtype
from engine.models.decoder import LayerCache, StepDecoder
from engine.models.lora import LoraSlots
from engine.plan import KVSpec, StepPlan, StepResult, TokenLogprobs
from engine.runner.adapters import Adapters
from engine.runner.batch import BatchShape, HostRowBatch, RowBatch
from engine.runner.draft import NO_GUESSES, DraftModel, Guesses
from engine.runner.host_blocks import HostBlocks, by_block
from engine.runner.host_zeros import host_zeros
from engine.runner.parked_weights import ParkedWeights
from engine.runner.pooled import pool_rows
from engine.runner.sampler import NO_TOKEN, LogprobTensors, Sampled, token_logprobs
from engine.runner.step_clock import StepClock
from engine.runner.step_cost import StepCost, StepNeeds
from engine.runner.structured import Followed
from engine.sampling_params import ALL_LOGPROBS

if TYPE_CHECKING:
    from engine.parallel.ranks import Ranks
    from engine.runner.decode_graphs import DecodeGraphs, Replay

# Rows of logits at once; a whole prompt's would be gigabytes with a large vocabulary.
PROMPT_LOGPROB_ROWS = 256
NOT_NUMBERS = "the model computed no numbers for it: its logits hold NaN or infinity"
_DEVICE_ERRORS: tuple[type[BaseException], ...] = tuple(
    error for error in (getattr(torch, "AcceleratorError", None),) if error is not None
)


@dataclass(frozen=True, slots=True)
class _Started:
    """A submitted step: host copies that become valid with `done`, and what is needed to describe them."""

    plan: StepPlan
    sampled: Sampled
    num_logprobs: list[int]  # of ``sampled.logprob_rows``
    # (row index, number of most likely tokens or ALL_LOGPROBS, figures)
    prompt: tuple[tuple[int, int, LogprobTensors], ...]
    pooled: tuple[tuple[int, Tensor], ...]  # (row index, vector)
    clock: StepClock
    needs: StepNeeds
    guesses: Guesses
    graph_size: int
    followed: Followed | None  # rows of it that follow a grammar


class ModelRunner:
    """Implements the Runner protocol with a native decoder and a paged KV cache that it allocates."""

    def __init__(
        self,
        decoder: StepDecoder,
        attention: AttentionBackend,
        *,
        config: EngineConfig,
        kv_spec: KVSpec,
        eos_token_ids: frozenset[int],
        device: torch.device,
        dtype: torch.dtype,
        lora_slots: LoraSlots | None = None,
        replay: Replay | None = None,
        load_decoder: Callable[[], StepDecoder] | None = None,
        ranks: Ranks | None = None,
        draft: DraftModel | None = None,
    ) -> None:
        """`lora_slots`: of the decoder, where it has them. `replay`: how decode steps are captured; None: as CUDA graphs on
        a GPU, not at all elsewhere. `load_decoder` makes `decoder` anew, for waking up from a sleep that did not keep it.
        `ranks`: with which other runners this one computes its steps; rank 0 chooses for all. `draft`: what guesses tokens for
        plans that ask for it."""
        assert config.num_blocks is not None, "the config is not resolved"
        assert config.max_model_len is not None, "the config is not resolved"
        on_device = device.type == "cuda" or replay is not None
        self._decoder: StepDecoder | None = decoder
        self._attention = attention
        self._device = device
        self._parks_weights = on_device
        self._max_inflight = 2 if on_device and config.async_scheduling else 1
        self._load_decoder = load_decoder
        self._ranks = ranks
        self._draft = draft
        self._parked: ParkedWeights | None = None
        self._is_asleep = False
        shape = BatchShape(
            config.max_num_seqs,
            config.max_model_len,
            config.block_size,
            decoder.config.vocab_size,
            eos_token_ids,
        )
        stored = cache_dtype(config.kv_cache_dtype, dtype)
        self.adapters = None if lora_slots is None else Adapters(lora_slots, config.max_num_seqs)
        self._batch: RowBatch | None
        self._replay: Replay | None = None
        if on_device:
            # Not at the top: Triton, which they need, is there on Linux alone.
            from engine.runner.decode_graphs import CudaGraphs
            from engine.runner.device_batch import DeviceRowBatch

            self._batch = DeviceRowBatch(shape, device, idle_block=config.num_blocks)
            if not config.enforce_eager and isinstance(attention, CapturableAttention):
                self._replay = replay or CudaGraphs()
        else:
            self._batch = HostRowBatch(shape, deterministic=config.deterministic)
        num_blocks = config.num_blocks + on_device  # one block for padding
        self._make_caches = partial(allocate_caches, kv_spec, num_blocks, stored, device)
        self._num_slots = kv_spec.num_blocks_in(config.swap_space_bytes)
        self._caches = self._make_caches()
        self._host = self._make_host()
        self._graphs = self._make_graphs()
        self._cost = StepCost(decoder.config, kv_spec, decoder.step_weights())
        self._inflight: deque[_Started | BaseException] = deque()

    @property
    def max_inflight(self) -> int:
        return self._max_inflight

    def capture(
        self, tell: Callable[[float], None] = lambda done: None, *, largest_only: bool = False
    ) -> None:
        """Capture the decode steps of all sizes before the first request; `tell` hears the share that is done.

        Raises:
            OutOfMemoryError, EngineDeadError: as a step does.
        """
        if self._graphs is None:
            return
        try:
            with self._on_device():
                self._graphs.capture(self._graphs.sizes[-1:] if largest_only else self._graphs.sizes, tell)
        except Exception as error:
            raise _as_engine_error(error) from error

    def submit(self, plan: StepPlan) -> None:
        """Start the step. What it raises comes out of `collect`.

        Raises:
            EngineDeadError: the runner is closed.
        """
        if self._decoder is None or self._batch is None:
            raise EngineDeadError("the model runner is closed", remedy="Build a new engine.")
        assert not self._is_asleep, "the runner is asleep"
        assert len(self._inflight) < self.max_inflight, "more steps submitted than max_inflight"
        try:
            with self._on_device():
                self._inflight.append(self._start(plan, self._decoder, self._batch))
        except Exception as error:  # noqa: BLE001 - the step boundary: the engine fails its requests with the cause
            self._inflight.append(error)

    def collect(self) -> StepResult:
        """Wait for the oldest step.

        Raises:
            EngineDeadError: the device context is broken.
            OutOfMemoryError: the device ran out of memory in this step.
        """
        started = self._inflight.popleft()
        if isinstance(started, BaseException):
            raise _as_engine_error(started) from started
        try:
            started.clock.wait()
        except Exception as error:
            raise _as_engine_error(error) from error
        self._follow(started)
        return _result(started)

    def _follow(self, started: _Started) -> None:
        """Take in what a step chose for rows that follow a grammar, once it is on the host."""
        if started.followed is not None and self._batch is not None:
            self._batch.grammars.advance(started.followed, started.sampled.token_ids.tolist())

    def reset_rows(self) -> None:
        """Forget every row and every step in flight."""
        self._inflight.clear()
        if self._batch is not None:
            self._batch.reset()
        if self.adapters is not None and self._decoder is not None:
            self.adapters.reset()

    def sleep(self, level: int) -> None:
        """Give weights, KV cache and captured steps back: 1 keeps the weights in host memory, 2 does not.

        On a CPU, whose weights are in host memory, 1 gives the KV cache back alone.

        Raises:
            ConfigError: level 2 of a runner that cannot load its weights again.
            EngineDeadError: the device context is broken.
        """
        assert self._decoder is not None, "the runner is closed or asleep"
        assert not self._inflight, "asleep with steps in flight"
        if level == 2 and self._load_decoder is None:
            raise ConfigError(
                "the engine cannot sleep at level 2: these weights cannot be loaded again",
                value=level, limit=1, param="level",
            )  # fmt: skip
        try:
            if level == 1 and self._parks_weights:
                assert isinstance(self._decoder, nn.Module)
                self._parked = ParkedWeights(self._decoder)
            self._is_asleep = True
            self._drop_steps()
            if self._draft is not None:
                self._draft.sleep(level)
            if level == 2:
                self._decoder = None
            self._give_back()
        except Exception as error:
            raise _as_engine_error(error) from error

    def wake_up(self) -> None:
        """Be as before `sleep`, but for what the KV cache held. If it raises, the runner sleeps on.

        Raises:
            OutOfMemoryError: the device does not have the memory any more.
            CorruptWeightsError: the files are not what they were.
            EngineDeadError: the device context is broken.
        """
        assert self._is_asleep, "the runner is awake or closed"
        try:
            self._caches = self._make_caches()
            self._host = self._make_host()
            if self._decoder is None:
                assert self._load_decoder is not None
                self._decoder = self._load_decoder()
            if self._parked is not None:
                self._parked.restore()
                self._parked = None
            if self._draft is not None:
                self._draft.wake_up()
            self._graphs = self._make_graphs()  # the captured ones hold addresses that are no more
            self.capture()
        except Exception as error:
            with suppress(RuntimeError):  # a broken context has nothing left to give back
                self._drop_steps()
                if self._draft is not None:
                    self._draft.sleep(1)
                self._give_back()
            raise _as_engine_error(error) from error
        self._is_asleep = False

    def close(self) -> None:
        """Give the device's memory back. A second call does nothing."""
        if self._batch is None:
            return
        self._inflight.clear()
        with suppress(RuntimeError):  # a broken context has nothing left to give back
            self._drop_steps()
        if self.adapters is not None:
            self.adapters.close()
        self._decoder, self._batch, self._parked, self._is_asleep = None, None, None, False
        self._draft = None
        del self._attention  # and with it the workspace of its kernels
        with suppress(RuntimeError):
            self._give_back()

    def _make_host(self) -> HostBlocks | None:
        return HostBlocks(self._num_slots, by_block(self._caches)) if self._num_slots else None

    def _make_graphs(self) -> DecodeGraphs | None:
        if self._replay is None:
            return None
        from engine.runner.decode_graphs import DecodeGraphs
        from engine.runner.device_batch import DeviceRowBatch

        assert self._decoder is not None
        assert isinstance(self._batch, DeviceRowBatch)
        assert isinstance(self._attention, CapturableAttention)
        return DecodeGraphs(
            self._decoder, self._attention, self._caches, self._batch, self._replay, max_inflight=self._max_inflight,
            adapters=self.adapters,
        )  # fmt: skip

    def _drop_steps(self) -> None:
        """Let go of the KV cache, on the device and in host memory, and of captured steps."""
        host, self._host = self._host, None
        if host is not None:
            host.close()
        self._caches.clear()  # in place: a decoder may know the list
        graphs, self._graphs = self._graphs, None
        if graphs is not None:
            graphs.close()

    def _give_back(self) -> None:
        """Hand to the device what no tensor uses."""
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch._C._cuda_clearCublasWorkspaces()  # torch would keep them for the life of the process
            torch.cuda.empty_cache()
            torch._C._host_emptyCache()  # pinned memory: of parked weights, and of what loaded them

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """Events and kernels go to the current device, which is a matter of each thread."""
        device = torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()
        with torch.inference_mode(), device:
            yield

    def _start(self, plan: StepPlan, decoder: StepDecoder, batch: RowBatch) -> _Started:
        clock = StepClock(self._device)
        if self._host is not None:
            self._host.copy(plan.copies)
        batch.apply(plan)
        if self.adapters is not None:
            self.adapters.apply(plan)
        guesses, needs = NO_GUESSES, StepNeeds(0, 0, 0, 0)
        if plan.drafting is not None:
            assert self._draft is not None, "a step for a draft model that is not there"
            clock.begin()
            guesses, needs = self._draft.guess(plan.drafting, batch)
        size = self._graphs.size_for(plan) if self._graphs is not None else 0
        prompt: tuple[tuple[int, int, LogprobTensors], ...] = ()
        pooled: tuple[tuple[int, Tensor], ...] = ()
        followed = batch.grammars.followed(plan)
        if size and self._graphs is not None:
            self._graphs.send(plan, size)
            clock.begin()
            self._graphs.forward(plan, size)
            clock.mark()
            self._limit(followed, batch)
            sampled = self._graphs.choose(plan, size)
        else:
            inputs = batch.step_inputs(plan)
            if self.adapters is not None:
                self.adapters.use(plan)
            clock.begin()
            hidden = decoder.forward(
                inputs.token_ids, inputs.positions, self._caches, inputs.meta, self._attention
            )
            sampled = Sampled(inputs.logit_index, None, ())
            chooses = len(plan.logit_rows) > 0 and (self._ranks is None or self._ranks.rank == 0)
            logits = decoder.logits(_rows_of(hidden, inputs.logit_index)) if chooses else None
            clock.mark()
            if logits is not None:
                self._limit(followed, batch)
                sampled = batch.choose(logits, plan)
            if self._ranks is not None and len(plan.logit_rows):
                sampled = _agreed(self._ranks, sampled, batch, plan)
            prompt = self._prompt_logprobs(plan, decoder, batch, hidden)
            if batch.pooling:
                pooled = pool_rows(plan, batch, decoder, hidden)
        wanted = batch.num_logprobs[plan.rows[plan.choices.row_index]][list(sampled.logprob_rows)].tolist()
        if not isinstance(
            batch, HostRowBatch
        ):  # there is nothing to copy there, and asking would let other threads in
            sampled = sampled.to_host()
        clock.mark()
        needs += self._cost.of(plan, sum(len(figures.token_ids) for _, _, figures in prompt))
        return _Started(plan, sampled, wanted, prompt, pooled, clock, needs, guesses, size, followed)

    def _limit(self, followed: Followed | None, batch: RowBatch) -> None:
        """Mask what the sampler will choose from, as far as grammars say; they need the tokens of the steps in flight."""
        if followed is None:
            return
        for started in self._inflight:
            if isinstance(started, _Started) and started.followed is not None:
                started.clock.wait()
                self._follow(started)
        batch.limit(followed)

    def _prompt_logprobs(
        self, plan: StepPlan, decoder: StepDecoder, batch: RowBatch, hidden: Tensor
    ) -> tuple[tuple[int, int, LogprobTensors], ...]:
        """Figures of the prompt tokens that follow this step's tokens, for the rows that asked."""
        found = []
        first = np.cumsum(plan.num_tokens) - plan.num_tokens
        for i in batch.scored(plan).tolist():
            row, start = int(plan.rows[i]), int(plan.start[i])
            skipped = max(0, int(batch.logprob_start[row]) - 1 - start)
            count = min(int(plan.num_tokens[i]), int(batch.num_prompt_tokens[row]) - 1 - start)
            num_top = int(batch.prompt_logprobs[row])
            for begin in range(skipped, count, PROMPT_LOGPROB_ROWS):
                stop = min(begin + PROMPT_LOGPROB_ROWS, count)
                part = hidden[int(first[i]) + begin : int(first[i]) + stop]
                # A copy: on a CPU the slice is the row buffer itself, which a later request will overwrite.
                targets = batch.tokens[row, start + 1 + begin : start + 1 + stop].long()
                found.append((i, num_top, _prompt_figures(decoder.logits(part), targets, num_top)))
        return tuple(found)


def allocate_caches(
    kv_spec: KVSpec, num_blocks: int, dtype: torch.dtype, device: torch.device
) -> list[LayerCache]:
    """K and V of every layer in one allocation, each layer's in KVSpec's layout; `dtype` is the cache's.

    Scales of int8 are one allocation more; of fp8 they are 1.0 everywhere, so that all layers share theirs.
    """
    shape = (kv_spec.num_layers, 2, num_blocks, kv_spec.num_kv_heads, kv_spec.block_size, kv_spec.head_size)
    on_cpu = device.type == "cpu"
    memory = host_zeros(shape, dtype) if on_cpu else torch.zeros(shape, dtype=dtype, device=device)
    if dtype not in QUANTIZED_DTYPES:
        return [LayerCache(layer[0], layer[1]) for layer in memory]
    if dtype == torch.int8:
        scales = torch.zeros(shape[:-1], device=device)
    else:
        scales = torch.ones(kv_spec.num_kv_heads, device=device).expand(kv_spec.num_layers, 2, -1)
    return [
        LayerCache(layer[0], layer[1], scale[0], scale[1])
        for layer, scale in zip(memory, scales, strict=True)
    ]


def _agreed(ranks: Ranks, sampled: Sampled, batch: RowBatch, plan: StepPlan) -> Sampled:
    """What rank 0 sampled; on the other ranks its tokens alone, put behind their rows' last ones."""
    if ranks.rank == 0:
        ranks.from_first(sampled.token_ids.to(torch.int32, copy=True))
        return sampled
    token_ids = torch.empty(len(plan.choices.positions), dtype=torch.int32, device=batch.tokens.device)
    batch.put_chosen(ranks.from_first(token_ids), plan)
    return Sampled(token_ids, None, ())


def _prompt_figures(logits: Tensor, token_ids: Tensor, num_top: int) -> LogprobTensors:
    """Figures of given tokens [n] under logits [n, V], on their way to the host; ALL_LOGPROBS: and the rows themselves.

    In a function of its own, so that the logits do not live on beside the next part's.
    """
    figures = token_logprobs(logits, token_ids, max(0, num_top)).to_host()
    if num_top == ALL_LOGPROBS:
        figures = replace(figures, logits=logits.to("cpu", non_blocking=True))
    return figures


def _rows_of(hidden: Tensor, index: Tensor) -> Tensor:
    """The rows of `hidden` [T, hidden] that are sampled from; all of them in a step that only decodes."""
    return hidden if len(index) == len(hidden) else hidden.index_select(0, index)


def _result(started: _Started) -> StepResult:
    plan = started.plan
    logprobs: dict[int, TokenLogprobs] = {}
    sampled = started.sampled
    token_ids: list[int] = sampled.token_ids.tolist()
    if sampled.logprobs is not None:
        entries = sampled.logprobs.entries(started.num_logprobs)
        logprobs = dict(zip(sampled.logprob_rows, entries, strict=True))
    prompt: dict[int, list[TokenLogprobs]] = {}
    for i, num_top, figures in started.prompt:
        prompt.setdefault(i, []).extend(figures.entries([max(0, num_top)] * len(figures.token_ids)))
    return StepResult(
        step_id=plan.step_id,
        token_ids=token_ids,
        logprobs=logprobs,
        prompt_logprobs=prompt,
        guesses=started.guesses.by_row(),
        pooled={i: vector.numpy() for i, vector in started.pooled},
        dead_ends=_dead_ends(token_ids, started.followed),
        prepare_ms=started.clock.prepare_ms,
        forward_ms=started.clock.elapsed_ms(0),
        sample_ms=started.clock.elapsed_ms(1),
        graph_size=started.graph_size,
        bytes_needed=started.needs.weight_bytes + started.needs.kv_bytes,
        flops_needed=started.needs.linear_flops + started.needs.attention_flops,
        weight_bytes=started.needs.weight_bytes,
        attention_flops=started.needs.attention_flops,
    )


def _dead_ends(token_ids: list[int], followed: Followed | None) -> dict[int, str]:
    found = {} if followed is None else followed.dead_ends
    if token_ids and min(token_ids) == NO_TOKEN:
        found = found | {j: NOT_NUMBERS for j, token in enumerate(token_ids) if token == NO_TOKEN}
    return found


def _as_engine_error(error: BaseException) -> BaseException:
    """The engine's type for what a step raised; other errors stay as they are."""
    if isinstance(error, torch.OutOfMemoryError):
        return OutOfMemoryError(
            f"the device ran out of memory in a step ({error})",
            remedy="Lower max_batched_tokens, max_num_seqs or num_blocks.",
        )
    if isinstance(error, _DEVICE_ERRORS) or (
        isinstance(error, RuntimeError)
        and ("CUDA error" in str(error) or "Triton Error [CUDA]" in str(error))
    ):
        return EngineDeadError(f"the device context is broken ({error})", remedy="Restart the process.")
    return error
