"""Floors: the least seconds that a workload can take on a device with the measured limits.

What a decode step or a prefill needs is worked out from shape and lengths; the floor of that is `engine.limits.floors`, as for
the steps of a record. A prompt of n tokens has n²/2 pairs of query and key; only tokens that sample pass the output head.

Boundary: arithmetic on shapes and lengths; full attention in every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.limits import Limits, floors
from engine.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Floor:
    """Least seconds of a workload."""

    prefill_s: float
    decode_s: float

    @property
    def seconds(self) -> float:
        return self.prefill_s + self.decode_s


@dataclass(frozen=True, slots=True)
class ModelCost:
    """What a model makes a device read and multiply. `weight_bits`: of the matrices in the layers; the head keeps `dtype_bytes`.

    `kv_dtype_bytes`: of a stored key's or value's number; scales are left out, as those of the weights are.
    """

    model: ModelConfig
    dtype_bytes: int = 2
    weight_bits: int | None = None  # None: dtype_bytes
    kv_dtype_bytes: int | None = None  # None: dtype_bytes

    @property
    def parameters(self) -> int:
        """P: read in every step."""
        return self.model.num_step_parameters

    @property
    def head_parameters(self) -> int:
        return self.model.vocab_size * self.model.hidden_size

    @property
    def weight_bytes(self) -> float:
        """Read in every step; scales of quantized weights left out, so that the floor stays one."""
        bits = self.weight_bits or 8 * self.dtype_bytes
        body = self.parameters - self.head_parameters
        return body * bits / 8 + self.head_parameters * self.dtype_bytes

    @property
    def kv_token_bytes(self) -> int:
        model = self.model
        num_bytes = self.kv_dtype_bytes or self.dtype_bytes
        return 2 * model.num_layers * model.num_kv_heads * model.head_size * num_bytes

    @property
    def _pair_flops(self) -> float:
        """Operations for a query and a key, over all layers."""
        return 4.0 * self.model.num_layers * self.model.num_heads * self.model.head_size

    def decode_s(self, limits: Limits, rows: int, context_tokens: int) -> float:
        """One step that decodes `rows` sequences which together have `context_tokens`."""
        linear = 2.0 * (self.model.num_layer_products + self.head_parameters) * rows
        kv_bytes = float(context_tokens * self.kv_token_bytes)
        return floors(limits, self.weight_bytes, kv_bytes, linear, self._pair_flops * context_tokens).total_s

    def prefill_s(self, limits: Limits, prompts: Sequence[tuple[int, int]]) -> float:
        """Prompts of (tokens already cached, tokens to compute) up to one sampled token each."""
        cached, count = (np.array(column, dtype=np.float64) for column in zip(*prompts, strict=True))
        body = 2.0 * self.model.num_layer_products * float(count.sum())
        head = 2.0 * self.head_parameters * len(prompts)
        pairs = float((count * cached + count**2 / 2).sum())
        kv_bytes = float(cached.sum()) * self.kv_token_bytes
        return floors(limits, self.weight_bytes, kv_bytes, body + head, self._pair_flops * pairs).total_s

    def workload(self, limits: Limits, lengths: Sequence[tuple[int, int]]) -> Floor:
        """Requests of (input, output) tokens that all arrive at once and all run at once: prefills, then decode steps.

        A prefill chooses the first output token, so n output tokens take n - 1 decode steps.
        """
        inputs, outputs = (np.array(column, dtype=np.int64) for column in zip(*lengths, strict=True))
        decode = 0.0
        for step in range(1, int(outputs.max())):
            running = outputs > step
            decode += self.decode_s(
                limits, int(running.sum()), int(inputs[running].sum() + step * running.sum())
            )
        return Floor(self.prefill_s(limits, [(0, n) for n in inputs.tolist()]), decode)
