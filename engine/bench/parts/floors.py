"""Floors: the least seconds that a workload can take on a device with the measured limits.

- a decode step: max(weight bytes ÷ bandwidth, 2·P·B ÷ matrix rate) + Σ context · KV bytes per token ÷ bandwidth
- a prefill: (2·P·T + 4·L·H·D·Σ pairs) ÷ matrix rate, where a prompt of n tokens has n²/2 pairs of query and key

P: parameters that a step reads (no input embedding); of a prefill's tokens only those that sample pass the output head, so it
counts once a sequence there. Decode reads weights and KV one after the other, layer by layer, hence the sum.

Boundary: arithmetic on shapes and lengths; full attention in every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.bench.parts.limits import Limits
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

    def decode_s(self, limits: Limits, rows: int, context_tokens: int) -> float:
        """One step that decodes `rows` sequences which together have `context_tokens`."""
        products = limits.seconds(self.weight_bytes, 2.0 * self.parameters * rows)
        return products + context_tokens * self.kv_token_bytes / limits.bytes_s

    def prefill_s(self, limits: Limits, prompts: Sequence[tuple[int, int]]) -> float:
        """Prompts of (tokens already cached, tokens to compute) up to one sampled token each."""
        model = self.model
        cached, count = (np.array(column, dtype=np.float64) for column in zip(*prompts, strict=True))
        body = 2.0 * (self.parameters - self.head_parameters) * count.sum()
        head = 2.0 * self.head_parameters * len(prompts)
        pairs = float((count * cached + count**2 / 2).sum())
        attention = 4.0 * model.num_layers * model.num_heads * model.head_size * pairs
        num_bytes = self.weight_bytes + float(cached.sum()) * self.kv_token_bytes
        return limits.seconds(num_bytes, body + head + attention)

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
