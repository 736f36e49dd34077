"""The profile run: the largest steps that a config allows, run once on a small KV cache, and the memory that they took.

Then the largest decode step is captured: graphs share one pool of memory and are captured largest first, so that the smaller
ones find room in what the largest took.

Activations, logits and the sampler's copies of them, row buffers, kernels' workspaces and the allocator's rounding depend on
kernels and libraries that no formula follows: they are measured, so that the KV cache can have the rest. Another engine that
runs on the device meanwhile makes the figure larger, never smaller.

Boundary: plans and one reading. What the bytes are used for is ``engine.pool_size``'s and ``engine.build``'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from engine.config import EngineConfig
from engine.memory import Allocator
from engine.plan import KVSpec, RowAdmission, StepPlan
from engine.runner.host_blocks import STAGING_BYTES
from engine.runner.model_runner import ModelRunner
from engine.sampling_params import MAX_LOGPROBS, SamplingParams

PROFILE_BLOCKS = 16  # KV blocks of the run, shared by all rows: what they write over one another nobody reads


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Bytes that the largest steps take beside weights and KV cache."""

    workspace_bytes: int
    graphs_bytes: int  # beside the workspace: captured steps keep theirs


def measure_steps(
    make_runner: Callable[[EngineConfig], ModelRunner],
    config: EngineConfig,
    kv_spec: KVSpec,
    allocator: Allocator,
    vocab_size: int,
) -> StepMemory:
    """What the largest steps of a resolved config take, made operation by operation and captured.

    Raises:
        OutOfMemoryError: they do not fit on the device, whatever the KV cache.
    """
    allocator.reset_peak()
    before, graphs_before = allocator.held_bytes(), allocator.graph_bytes()
    # Of a host tier only what it takes on the device.
    swap_space_bytes = min(config.swap_space_bytes, STAGING_BYTES)
    runner = make_runner(replace(config, num_blocks=PROFILE_BLOCKS, swap_space_bytes=swap_space_bytes))
    try:
        for plan in largest_steps(config, vocab_size):
            runner.submit(plan)
            runner.collect()
        peak = allocator.peak_bytes()
        runner.capture(largest_only=True)
        graphs = allocator.graph_bytes() - graphs_before
        peak = max(peak, allocator.peak_bytes() - graphs)  # it is padded to more rows than there are
    finally:
        runner.close()
        allocator.reset_peak()
    return StepMemory(max(0, peak - before - kv_spec.pool_bytes(PROFILE_BLOCKS)), max(0, graphs))


def largest_steps(config: EngineConfig, vocab_size: int) -> tuple[StepPlan, StepPlan]:
    """The widest step, then the deepest one.

    Widest: `max_batched_tokens` tokens over as many rows as there are, every row sampled with every filter, the longest
    with the log-probabilities of its prompt. Deepest: every row one token, at the end of the context. Where there are adapters,
    every row uses a slot.
    """
    assert config.max_batched_tokens is not None
    assert config.max_model_len is not None
    num_rows = min(config.max_num_seqs, config.max_batched_tokens)
    longest = config.max_model_len
    # Controls of all kinds, every filter over nearly the whole vocabulary, and the most log-probabilities that may be asked for.
    params = SamplingParams(
        top_k=max(1, vocab_size - 1), top_p=0.99, min_p=1e-6, min_tokens=1, stop_token_ids=(0,), logprobs=MAX_LOGPROBS,
        presence_penalty=1.0,
    )  # fmt: skip
    wide = _spread(config.max_batched_tokens, num_rows, max(1, longest - 1))
    last = params.with_(prompt_logprobs=MAX_LOGPROBS)
    widest = _step(0, [0] * num_rows, wide, [*[params] * (num_rows - 1), last], config, ())
    deepest = _step(1, [longest - 1] * num_rows, [1] * num_rows, [params] * num_rows, config, range(num_rows))
    return widest, deepest


def _spread(num_tokens: int, num_rows: int, most: int) -> list[int]:
    """Tokens of each row, ascending: as many in the last as one row may compute, the rest evenly over the others."""
    last = min(most, num_tokens - (num_rows - 1))
    if num_rows == 1:
        return [last]
    share, extra = divmod(num_tokens - last, num_rows - 1)
    others = [share] * (num_rows - 1 - extra) + [share + 1] * extra
    return sorted([*(min(most, n) for n in others), last])


def _step(
    step_id: int,
    start: Sequence[int],
    num_tokens: Sequence[int],
    params: Sequence[SamplingParams],
    config: EngineConfig,
    finished: Sequence[int],
) -> StepPlan:
    """A step of rows 0 … S - 1, all admitted with it, that compute and sample."""
    num_rows = len(start)
    ends = [first + count for first, count in zip(start, num_tokens, strict=True)]
    # Rows of one length share a text and a table: a thousand long ones of their own would fill the host's memory.
    texts = {end: [0] * end for end in ends}
    tables = {end: tuple(i % PROFILE_BLOCKS for i in range(-(-end // config.block_size))) for end in ends}
    admitted = [
        RowAdmission(
            row,
            f"row {row}",
            texts[end],
            end,
            start[row],
            (tables[end],),
            params[row],
            row,
            row % config.max_loras if config.enable_lora else -1,
        )
        for row, end in enumerate(ends)
    ]
    return StepPlan(
        step_id=step_id,
        rows=np.arange(num_rows, dtype=np.int32),
        start=np.array(start, dtype=np.int32),
        num_tokens=np.array(num_tokens, dtype=np.int32),
        num_draft=np.zeros(num_rows, dtype=np.int32),
        logit_rows=np.arange(num_rows, dtype=np.int32),
        new_block_offsets=(np.zeros(num_rows + 1, dtype=np.int32),),
        new_block_ids=(np.zeros(0, dtype=np.int32),),
        admitted=tuple(admitted),
        finished=tuple(finished),
    )
