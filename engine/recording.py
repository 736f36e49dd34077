"""Recorder: turns what the engine did into the records that the outside sees, and counts it.

One Recorder per engine, used on the engine's thread. Counters are accumulators, so that a snapshot is O(1). Boundary: it
decides nothing, touches no device and keeps no history (``engine.record_log`` does).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from engine.plan import StepResult, TokenLogprobs
from engine.records import BlockKeyframe, RequestRecord, StepRecord
from engine.request import FinishReason, Request
from engine.scheduler import PlannedStep, Scheduler
from engine.stop_text import StopTextMatcher
from engine.tokenizer import IncrementalDetokenizer

KEYFRAME_STEPS = 256  # a block map is rebuilt from at most this many steps of events
NO_RESULT = StepResult(step_id=-1, token_ids=[])


@dataclass(slots=True)
class StepTiming:
    """When a step began on the host and what planning and committing it cost there."""

    started_ns: int
    schedule_ns: int


class RequestTrack:
    """What the engine remembers of a live request besides its Sequence."""

    __slots__ = ("admitted_ns", "detokenizer", "matcher", "num_cached_tokens", "prompt_logprobs", "request", "token_ns")

    def __init__(self, request: Request, detokenizer: IncrementalDetokenizer | None) -> None:
        params = request.params
        self.request = request
        self.admitted_ns: int | None = None
        self.num_cached_tokens = 0
        self.token_ns: list[int] = []
        self.detokenizer = detokenizer
        self.matcher = (
            StopTextMatcher(params.stop, include_in_output=params.include_stop_str_in_output) if params.stop else None
        )
        self.prompt_logprobs: dict[int, TokenLogprobs] = {}  # by position


class Recorder:
    """Makes StepRecords and RequestRecords, and counts."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._since_keyframe = KEYFRAME_STEPS  # the first record carries one
        self.num_steps = 0
        self.num_step_errors = 0
        self.num_prompt_tokens = 0
        self.num_cached_prompt_tokens = 0
        self.num_output_tokens = 0
        self.num_finished: Counter[str] = Counter()

    def admitted(self, track: RequestTrack, num_cached_tokens: int, at_ns: int) -> None:
        """Count a request's first admission; later ones (after preemption) are not admissions of a prompt."""
        if track.admitted_ns is None:
            track.admitted_ns = at_ns
            track.num_cached_tokens = num_cached_tokens
            self.num_prompt_tokens += len(track.request.prompt_token_ids)
            self.num_cached_prompt_tokens += num_cached_tokens

    def step(
        self, step: PlannedStep, timing: StepTiming, ended_ns: int, result: StepResult = NO_RESULT,
        *, finished: tuple[str, ...] = (), error: str | None = None,
    ) -> StepRecord:
        """The record of a step that was committed or failed, with all block events since the last record."""
        scheduler = self._scheduler
        pool = scheduler.blocks.pool
        events = scheduler.blocks.take_events()
        self.num_steps += 1
        self.num_step_errors += error is not None
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
            preempted=tuple(seq.request_id for seq in step.preempted),
            prefix_hits=tuple(step.prefix_hits),
            finished=finished,
            block_events=events,
            keyframe=self._keyframe(),
            graph_size=result.graph_size,
            bytes_needed=result.bytes_needed,
            flops_needed=result.flops_needed,
            error=error,
        )

    def request(
        self, track: RequestTrack, reason: FinishReason, at_ns: int, num_preemptions: int, error: str | None
    ) -> RequestRecord:
        """The record of a request that ended."""
        self.num_finished[reason.value] += 1
        token_ns = tuple(track.token_ns)
        return RequestRecord(
            request_id=track.request.request_id,
            arrival_ns=track.request.arrival_ns,
            admitted_ns=track.admitted_ns,
            first_token_ns=token_ns[0] if token_ns else None,
            finished_ns=at_ns,
            num_prompt_tokens=len(track.request.prompt_token_ids),
            num_cached_tokens=track.num_cached_tokens,
            num_output_tokens=len(token_ns),
            num_preemptions=num_preemptions,
            finish_reason=reason,
            token_ns=token_ns,
            error=error,
        )

    def _keyframe(self) -> BlockKeyframe | None:
        self._since_keyframe += 1
        if self._since_keyframe <= KEYFRAME_STEPS:
            return None
        self._since_keyframe = 1
        return BlockKeyframe(
            owners={seq.request_id: tuple(seq.block_ids) for seq in self._scheduler.running},
            published=self._scheduler.blocks.pool.published_ids(),
        )
