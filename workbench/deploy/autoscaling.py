"""How many replicas: as many as keep the tokens that wait for a row, in each of them, at a target.

Ray's own policy counts requests; of two requests one may be a thousand times the other. Ray bounds the result by
`min_replicas` and `max_replicas` and applies the delays and factors of its autoscaling config.

Boundary: the number. Imports no Ray.
"""

from __future__ import annotations

import math
from typing import Any

METRIC = "queued_tokens"  # of the replica's `record_autoscaling_stats`


class QueuedTokensPolicy:
    """A policy of Ray Serve; `target_queued_tokens` is per replica."""

    def __init__(self, target_queued_tokens: int = 4096) -> None:
        self._target = target_queued_tokens

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        """The wanted number of replicas. One goes when those that would be left had no queue either, and nothing waits here."""
        told = (context.aggregated_metrics or {}).get(METRIC, {})
        queued = sum(float(value) for value in told.values())
        now = int(context.current_num_replicas)
        if queued > self._target * now:
            return math.ceil(queued / self._target), {}
        if queued or float(context.total_queued_requests or 0):
            return now, {}
        running = float(context.total_num_requests or 0)
        slots = float((context.config.target_ongoing_requests if context.config else None) or 1)
        return max(min(now, math.ceil(running / slots)), now - 1, 1), {}
