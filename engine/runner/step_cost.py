"""Bytes and floating-point operations that a step cannot do without: the yardstick of its speed.

Bytes: every weight once (of an untied input embedding only the looked-up rows, which are left out), each row's keys and
values within its layers' windows, and the new ones. Operations: two per weight and token, the output head only for rows
that sample, and four per head value, query and key seen. Boundary: arithmetic on the plan; nothing is measured here.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from engine.models.config import ModelConfig
from engine.plan import KVSpec, StepPlan


class StepCost:
    """The cost function of one model and KV layout. `dtype_bytes`: of a weight."""

    def __init__(self, config: ModelConfig, kv_spec: KVSpec, dtype_bytes: int) -> None:
        head = config.vocab_size * config.hidden_size
        self._weight_bytes = config.num_step_parameters * dtype_bytes
        self._body_flops = 2 * (config.num_step_parameters - head)
        self._head_flops = 2 * head
        self._pair_flops = 4 * config.num_heads * config.head_size
        self._layer_token_bytes = kv_spec.bytes_per_token // kv_spec.num_layers
        self._token_bytes = kv_spec.bytes_per_token
        self._layers_by_window = Counter(config.sliding_windows)

    def of(self, plan: StepPlan) -> tuple[int, int]:
        """(bytes, operations) of one step."""
        start, count = plan.start.astype(np.int64), plan.num_tokens.astype(np.int64)
        keys = pairs = 0
        for window, layers in self._layers_by_window.items():
            seen = start + count
            row_pairs = count * start + count * (count + 1) // 2
            if window is not None:
                seen = np.minimum(seen, window + count - 1)
                row_pairs = np.minimum(row_pairs, count * window)
            keys += layers * int(seen.sum())
            pairs += layers * int(row_pairs.sum())
        tokens = int(count.sum())
        num_bytes = self._weight_bytes + keys * self._layer_token_bytes + tokens * self._token_bytes
        flops = self._body_flops * tokens + self._head_flops * len(plan.logit_rows) + self._pair_flops * pairs
        return num_bytes, flops
