"""Recorder: turns steps into the records that the outside sees, and counts.

One Recorder per engine, used on the engine's thread. Counters are accumulators, so that a snapshot is O(1). Boundary: it
decides nothing, touches no device and keeps no history (``engine.record_log`` does).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from engine.plan import NO_COPIES, StepResult
from engine.planned_step import PlannedStep
from engine.records import BlockKeyframe, StepRecord
from engine.request import FinishReason
from engine.scheduler import Scheduler

KEYFRAME_STEPS = 256  # a block map is rebuilt from at most this many steps of events
NO_RESULT = StepResult(step_id=-1, token_ids=[])


@dataclass(slots=True)
class StepTiming:
    """When a step began on the host and what planning and committing it cost there."""

    started_ns: int
    schedule_ns: int


class Recorder:
    """Makes StepRecords and counts."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._since_keyframe = KEYFRAME_STEPS  # the first record carries one
        self.num_steps = 0
        self.num_step_errors = 0
        self.num_prompt_tokens = 0
        self.num_cached_prompt_tokens = 0
        self.num_output_tokens = 0
        self.num_blocks_out = 0
        self.num_blocks_back = 0
        self.num_finished: Counter[str] = Counter()

    def count_prompt(self, num_tokens: int, num_cached_tokens: int) -> None:
        """A prompt was admitted for the first time."""
        self.num_prompt_tokens += num_tokens
        self.num_cached_prompt_tokens += num_cached_tokens

    def count_finished(self, reason: FinishReason) -> None:
        """A request ended."""
        self.num_finished[reason.value] += 1

    def step(
        self,
        step: PlannedStep,
        timing: StepTiming,
        ended_ns: int,
        result: StepResult = NO_RESULT,
        *,
        finished: tuple[str, ...] = (),
        num_accepted_tokens: int = 0,
        error: str | None = None,
    ) -> StepRecord:
        """The record of a step that was committed or failed, with all block events since the last record."""
        scheduler = self._scheduler
        pool = scheduler.blocks.pool
        events = scheduler.blocks.take_events()
        self.num_steps += 1
        self.num_step_errors += error is not None
        copies = step.copies if error is None else NO_COPIES
        self.num_blocks_out += len(copies.out)
        self.num_blocks_back += len(copies.back)
        return StepRecord(
            step_id=step.step_id,
            started_ns=timing.started_ns,
            ended_ns=ended_ns,
            schedule_ms=timing.schedule_ns / 1e6,
            prepare_ms=result.prepare_ms,
            forward_ms=result.forward_ms,
            sample_ms=result.sample_ms,
            rows=step.rows(),
            num_prefill_tokens=step.num_tokens - step.num_decode_tokens,
            num_decode_tokens=step.num_decode_tokens,
            num_waiting=len(scheduler.waiting),
            num_running=len(scheduler.running),
            num_free_blocks=pool.num_free,
            num_cached_blocks=pool.num_cached,
            num_blocks_out=len(copies.out),
            num_blocks_back=len(copies.back),
            preempted=tuple(seq.request_id for seq in step.preempted),
            prefix_hits=tuple(step.prefix_hits),
            finished=finished,
            block_events=events,
            keyframe=self._keyframe(),
            graph_size=result.graph_size,
            bytes_needed=result.bytes_needed,
            flops_needed=result.flops_needed,
            weight_bytes=result.weight_bytes,
            attention_flops=result.attention_flops,
            num_draft_tokens=step.num_draft_tokens,
            num_accepted_tokens=num_accepted_tokens,
            error=error,
        )

    def _keyframe(self) -> BlockKeyframe | None:
        self._since_keyframe += 1
        if self._since_keyframe <= KEYFRAME_STEPS:
            return None
        self._since_keyframe = 1
        return BlockKeyframe(
            tables={seq.request_id: (seq.block_ids, len(seq.block_ids)) for seq in self._scheduler.running},
            matchable=self._scheduler.blocks.pool.published_bits(),
        )
