"""Bytes and floating-point operations that a step cannot do without: the yardstick of its speed.

Bytes: the layers' weights as they are held, a row of the input embedding for each token, the output head in a step that
computes logits, each row's keys and values within its layers' windows, and the new ones once more, since they are written.
Operations: two per value of a weight matrix and token, of the output head only for positions whose logits are computed, and
four per value of a head for each query and key that it sees. Left out: activations, biases, norms' and rotary arithmetic, and
that rows which share cached blocks could read them together.

Boundary: arithmetic on the plan; nothing is measured here.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np

from engine.models.config import ModelConfig
from engine.models.decoder import StepWeights
from engine.plan import KVSpec, StepPlan


class StepNeeds(NamedTuple):
    """What one step needs."""

    weight_bytes: int
    kv_bytes: int  # read and written
    linear_flops: int  # with weights
    attention_flops: int  # with keys and values

    def __add__(self, other: StepNeeds) -> StepNeeds:  # type: ignore[override]
        return StepNeeds(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


class StepCost:
    """The cost function of one model, its weights as they are held, and its KV layout."""

    def __init__(self, config: ModelConfig, kv_spec: KVSpec, weights: StepWeights) -> None:
        self._weights = weights
        self._layer_flops = 2 * config.num_layer_products
        self._head_flops = 2 * config.vocab_size * config.hidden_size
        self._pair_flops = 4 * config.num_heads * config.head_size
        self._layer_token_bytes = kv_spec.bytes_per_token // kv_spec.num_layers
        self._token_bytes = kv_spec.bytes_per_token
        self._layers_by_window = Counter(config.sliding_windows)

    def of(self, plan: StepPlan, num_prompt_logits: int = 0) -> StepNeeds:
        """The needs of one step. `num_prompt_logits`: positions with logits beside those that sample."""
        start, count = plan.start.astype(np.int64), plan.num_tokens.astype(np.int64)
        end = start + count
        keys = pairs = 0
        for window, layers in self._layers_by_window.items():
            if window is None:  # each query sees all keys before it, and its own
                keys += layers * int(end.sum())
                pairs += layers * int(np.dot(count, start + end + 1)) // 2
                continue
            whole = np.clip(end - window, 0, count)  # queries that see a whole window
            short = count - whole  # and those before them
            keys += layers * int(np.minimum(end, window + count - 1).sum())
            pairs += layers * int(np.dot(short, 2 * start + short + 1) // 2 + window * whole.sum())
        tokens = int(count.sum())
        logits = len(plan.logit_rows) + int(plan.num_draft.sum()) + num_prompt_logits
        weights = self._weights
        return StepNeeds(
            weights.layers + tokens * weights.embedding_row + (weights.head if logits else 0),
            keys * self._layer_token_bytes + tokens * self._token_bytes,
            tokens * self._layer_flops + logits * self._head_flops,
            pairs * self._pair_flops,
        )
