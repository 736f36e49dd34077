"""What a step adds to the pooled vectors of the rows that ask for one: hidden states after the final norm.

A mean is summed chunk by chunk, in float64, so that how a prompt was cut shows only in that format's rounding. Nothing here
waits for the device. Boundary: rows of one step; the host adds the chunks up (``engine.outbox``).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engine.models.decoder import StepDecoder
from engine.plan import StepPlan
from engine.runner.batch import RowBatch

ROWS_AT_ONCE = 1024  # that are normalized together: bounds what a step holds beside its hidden states


def pool_rows(
    plan: StepPlan, batch: RowBatch, decoder: StepDecoder, hidden: Tensor
) -> tuple[tuple[int, Tensor], ...]:
    """(row index i, float64 vector [hidden] on its way to the host) of a step's hidden states [T, hidden].

    "last": of the prompt's last token, in the step that computes it. "mean": the sum over the step's tokens.
    """
    found: list[tuple[int, Tensor]] = []
    ends = np.cumsum(plan.num_tokens).tolist()
    for i, row in enumerate(plan.rows.tolist()):
        pooling = batch.pooling.get(row)
        if pooling is None:
            continue
        first, end = ends[i] - int(plan.num_tokens[i]), ends[i]
        if pooling.kind == "last":
            if int(plan.start[i]) + end - first < int(batch.num_prompt_tokens[row]):
                continue
            first = end - 1
        parts = torch.split(hidden[first:end], ROWS_AT_ONCE)
        pooled = sum(
            (decoder.final_hidden(part).sum(0, dtype=torch.float64) for part in parts),
            hidden.new_zeros(hidden.shape[1], dtype=torch.float64),
        )
        found.append((i, pooled.to("cpu", non_blocking=True)))
    return tuple(found)
