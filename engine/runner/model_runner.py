"""ModelRunner: executes step plans on one device.

A step is: take over the plan's deltas, build the flat inputs, run the decoder, sample, write the sampled tokens into the
row buffers, start one copy to the host. On a GPU nothing here waits for the device but `collect`, so that a second step
can be submitted while the first runs; on a CPU a step has run when `submit` returns.

Boundary: implements ``engine.plan.Runner``; no scheduling, no block accounting, no stop rules, no text.
"""

from __future__ import annotations

import gc
import time
from collections import deque
from contextlib import nullcontext, suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.attention.interface import AttentionBackend
from engine.config import EngineConfig
from engine.errors import EngineDeadError, OutOfMemoryError
from engine.models.decoder import LayerCache, StepDecoder
from engine.plan import KVSpec, StepPlan, StepResult, TokenLogprobs
from engine.runner.batch import RowBatch
from engine.runner.cpu_sampler import make_sampler
from engine.runner.sampler import LogprobTensors, Sampled, token_logprobs
from engine.runner.step_cost import StepCost

PROMPT_LOGPROB_ROWS = (
    256  # rows of logits at once; a whole prompt's would be gigabytes with a large vocabulary
)
_DEVICE_ERRORS: tuple[type[BaseException], ...] = tuple(
    error for error in (getattr(torch, "AcceleratorError", None),) if error is not None
)


@dataclass(frozen=True, slots=True)
class _Started:
    """A submitted step: host copies that become valid with `done`, and what is needed to describe them."""

    plan: StepPlan
    token_ids: Tensor
    logprobs: LogprobTensors | None
    logprob_rows: tuple[int, ...]
    num_logprobs: list[int]
    prompt: tuple[tuple[int, int, LogprobTensors], ...]  # (row index, number of most likely tokens, figures)
    prepare_ms: float
    clock: _Clock
    bytes_needed: int
    flops_needed: int


class _Clock:
    """Marks between the parts of a step: device events on a GPU, the host's clock on a CPU (where work has been done)."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[torch.cuda.Event | float] = []

    def mark(self) -> None:
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def wait(self) -> None:
        last = self._marks[-1]
        if isinstance(last, torch.cuda.Event):
            last.synchronize()

    def elapsed_ms(self, part: int) -> float:
        first, second = self._marks[part], self._marks[part + 1]
        if isinstance(first, torch.cuda.Event) and isinstance(second, torch.cuda.Event):
            return float(first.elapsed_time(second))
        assert isinstance(first, float)
        assert isinstance(second, float)
        return (second - first) * 1e3


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
    ) -> None:
        assert config.num_blocks is not None, "the config is not resolved"
        assert config.max_model_len is not None, "the config is not resolved"
        self._decoder: StepDecoder | None = decoder
        self._attention = attention
        self._device = device
        self._sample = make_sampler(device, deterministic=config.deterministic)
        self._caches = allocate_caches(kv_spec, config.num_blocks, dtype, device)
        self._batch: RowBatch | None = RowBatch(
            max_num_seqs=config.max_num_seqs,
            max_model_len=config.max_model_len,
            block_size=config.block_size,
            eos_token_ids=eos_token_ids,
            vocab_size=decoder.config.vocab_size,
            device=device,
        )
        self._cost = StepCost(decoder.config, kv_spec)
        self._inflight: deque[_Started | BaseException] = deque()

    @property
    def max_inflight(self) -> int:
        return 2 if self._device.type == "cuda" else 1

    def submit(self, plan: StepPlan) -> None:
        """Start the step. What it raises comes out of `collect`.

        Raises:
            EngineDeadError: the runner is closed.
        """
        if self._decoder is None or self._batch is None:
            raise EngineDeadError("the model runner is closed", remedy="Build a new engine.")
        assert len(self._inflight) < self.max_inflight, "more steps submitted than max_inflight"
        try:
            # Events and kernels go to the current device, which is a matter of each thread.
            on_device = torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()
            with torch.inference_mode(), on_device:
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
        return _result(started)

    def reset_rows(self) -> None:
        """Forget every row and every step in flight."""
        self._inflight.clear()
        if self._batch is not None:
            self._batch.reset()

    def close(self) -> None:
        """Give the device's memory back. A second call does nothing."""
        if self._decoder is None:
            return
        self._inflight.clear()
        self._decoder, self._batch = None, None
        self._caches = []
        del self._attention  # and with it the workspace of its kernels
        gc.collect()
        if self._device.type == "cuda":
            with suppress(RuntimeError):  # a broken context has nothing left to give back
                torch.cuda.synchronize(self._device)
                torch._C._cuda_clearCublasWorkspaces()  # torch would keep them for the life of the process
                torch.cuda.empty_cache()

    def _start(self, plan: StepPlan, decoder: StepDecoder, batch: RowBatch) -> _Started:
        began = time.perf_counter()
        clock = _Clock(self._device)
        batch.apply(plan)
        inputs = batch.step_inputs(plan)
        settings = batch.sample_settings(plan)
        clock.mark()
        prepare_ms = (time.perf_counter() - began) * 1e3
        hidden = decoder.forward(
            inputs.token_ids, inputs.positions, self._caches, inputs.meta, self._attention
        )
        sampled = Sampled(inputs.logit_index, None, ())
        logits = decoder.logits(_rows_of(hidden, inputs.logit_index)) if len(plan.logit_rows) else None
        clock.mark()
        if logits is not None:
            sampled = self._sample(logits, settings)
            batch.write_tokens(inputs, sampled.token_ids)
        prompt = self._prompt_logprobs(plan, decoder, batch, hidden)
        token_ids, logprobs = sampled.token_ids, sampled.logprobs
        if (
            self._device.type != "cpu"
        ):  # there is nothing to copy there, and asking would let other threads in
            token_ids = token_ids.to("cpu", non_blocking=True)
            logprobs = logprobs.to_host() if logprobs is not None else None
        clock.mark()
        bytes_needed, flops_needed = self._cost.of(plan)
        wanted = settings.num_logprobs[list(sampled.logprob_rows)].tolist()
        return _Started(
            plan,
            token_ids,
            logprobs,
            sampled.logprob_rows,
            wanted,
            prompt,
            prepare_ms,
            clock,
            bytes_needed,
            flops_needed,
        )

    def _prompt_logprobs(
        self, plan: StepPlan, decoder: StepDecoder, batch: RowBatch, hidden: Tensor
    ) -> tuple[tuple[int, int, LogprobTensors], ...]:
        """Figures of the prompt tokens that follow this step's tokens, for the rows that asked."""
        found = []
        first = np.cumsum(plan.num_tokens) - plan.num_tokens
        for i in np.nonzero(batch.wants_prompt_logprobs[plan.rows])[0].tolist():
            row, start = int(plan.rows[i]), int(plan.start[i])
            count = min(int(plan.num_tokens[i]), int(batch.num_prompt_tokens[row]) - 1 - start)
            num_top = max(0, int(batch.num_logprobs[row]))
            for begin in range(0, count, PROMPT_LOGPROB_ROWS):
                stop = min(begin + PROMPT_LOGPROB_ROWS, count)
                logits = decoder.logits(hidden[int(first[i]) + begin : int(first[i]) + stop])
                # A copy: on a CPU the slice is the row buffer itself, which a later request will overwrite.
                targets = batch.tokens[row, start + 1 + begin : start + 1 + stop].long()
                found.append((i, num_top, token_logprobs(logits, targets, num_top).to_host()))
        return tuple(found)


def allocate_caches(
    kv_spec: KVSpec, num_blocks: int, dtype: torch.dtype, device: torch.device
) -> list[LayerCache]:
    """K and V of every layer in one allocation, each layer's in KVSpec's layout."""
    shape = (kv_spec.num_layers, 2, num_blocks, kv_spec.num_kv_heads, kv_spec.block_size, kv_spec.head_size)
    memory = torch.zeros(shape, dtype=dtype, device=device)
    return [LayerCache(layer[0], layer[1]) for layer in memory]


def _rows_of(hidden: Tensor, index: Tensor) -> Tensor:
    """The rows of `hidden` [T, hidden] that are sampled from; all of them in a step that only decodes."""
    return hidden if len(index) == len(hidden) else hidden.index_select(0, index)


def _result(started: _Started) -> StepResult:
    plan = started.plan
    logprobs: dict[int, TokenLogprobs] = {}
    if started.logprobs is not None:
        entries = started.logprobs.entries(started.num_logprobs)
        logprobs = dict(zip(started.logprob_rows, entries, strict=True))
    prompt: dict[int, list[TokenLogprobs]] = {}
    for i, num_top, figures in started.prompt:
        prompt.setdefault(i, []).extend(figures.entries([num_top] * len(figures.token_ids)))
    return StepResult(
        step_id=plan.step_id,
        token_ids=started.token_ids.tolist(),
        logprobs=logprobs,
        prompt_logprobs=prompt,
        prepare_ms=started.prepare_ms,
        forward_ms=started.clock.elapsed_ms(0),
        sample_ms=started.clock.elapsed_ms(1),
        bytes_needed=started.bytes_needed,
        flops_needed=started.flops_needed,
    )


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
