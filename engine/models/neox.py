"""The block of GPT-NeoX: LayerNorms with biases, attention and a plain MLP side by side, each from its own norm of the residual.

Boundary: as `DecoderLayer` of ``engine.models.decoder``, in torch's operations. The merged projection stays as checkpoints have
it: each head's query, key and value side by side. Source: GPT-NeoX-20B (Black et al. 2022), section 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from engine.attention.interface import AttentionBackend, AttentionMetadata
from engine.kernels.invariant import in_pieces
from engine.models.config import ModelConfig
from engine.models.layers import ACTIVATIONS, LayerNorm, Linear, rotate
from engine.models.registry import TensorNames

if TYPE_CHECKING:
    from engine.models.decoder import LayerCache


class NeoXLayer(nn.Module):
    """Attention and MLP; without `parallel_residual` the MLP comes after attention, as elsewhere."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.num_heads, self.head_size = config.num_heads, config.head_size
        self.scale, self.is_parallel = config.attention_scale, config.parallel_residual
        self.activation = ACTIVATIONS[config.activation]
        self.invariant = False
        hidden, inner, eps = config.hidden_size, config.intermediate_size, config.rms_norm_eps
        q = config.num_heads * config.head_size

        def linear(n_in: int, n_out: int, bias: bool) -> Linear:
            return Linear(n_in, n_out, bias=bias, dtype=dtype, device=device)

        self.input_norm = LayerNorm(hidden, eps, dtype=dtype, device=device)
        self.post_attention_norm = LayerNorm(hidden, eps, dtype=dtype, device=device)
        self.qkv = linear(hidden, 3 * q, config.qkv_bias)
        self.out = linear(q, hidden, config.out_bias)
        self.up = linear(hidden, inner, config.mlp_bias)
        self.down = linear(inner, hidden, config.mlp_bias)

    def forward(
        self,
        x: Tensor | None,
        residual: Tensor,
        positions: Tensor,
        rotary: Tensor,
        cache: LayerCache,
        meta: AttentionMetadata,
        attention: AttentionBackend,
    ) -> Tensor:
        """What this layer adds to the residual [T, hidden]; see `DecoderLayer.forward`."""
        normed = self.input_norm(residual) if x is None else self.input_norm(x, residual)
        heads = self.qkv(normed).view(-1, self.num_heads, 3, self.head_size)
        table = rotary[positions]
        q, k, v = rotate(heads[:, :, 0], table), rotate(heads[:, :, 1], table), heads[:, :, 2].contiguous()
        attention.store_kv(
            k, v, cache.k, cache.v, meta.slot_mapping, k_scale=cache.k_scale, v_scale=cache.v_scale
        )
        mixed = attention.forward(
            q, cache.k, cache.v, meta, scale=self.scale, k_scale=cache.k_scale, v_scale=cache.v_scale
        )
        attended: Tensor = self.out(mixed.flatten(1))
        if self.is_parallel:
            return self._mlp(self.post_attention_norm(residual)) + attended
        return self._mlp(self.post_attention_norm(attended, residual))

    def weight_targets(self, names: TensorNames) -> Iterator[tuple[str, Tensor]]:
        """Checkpoint tensor names within the layer, each with the tensor that it fills."""
        hidden, inner = self.down.weight.shape
        yield from self.qkv.targets(((names.qkv[0], self.qkv.weight.shape[0]),))
        yield from self.out.targets(((names.out, hidden),))
        yield from self.up.targets(((names.gate_up[0], inner),))
        yield from self.down.targets(((names.down, hidden),))
        yield from self.input_norm.targets(names.input_norm)
        yield from self.post_attention_norm.targets(names.mlp_norm)

    def _mlp(self, x: Tensor) -> Tensor:
        inner = self.up(x)
        inner = in_pieces(self.activation, inner) if self.invariant else self.activation(inner)
        down: Tensor = self.down(inner)
        return down
