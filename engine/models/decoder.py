"""The decoder of the Llama-like families: Llama, Mistral, Qwen2, Qwen3, by configuration.

Boundary: token ids and positions of one flat step in, hidden states and logits out; K and V go through the attention
backend into caches that the runner owns. It knows no sequences, no scheduling and no files: `weight_targets` says where
each checkpoint tensor belongs, ``engine.models.weights`` fills it. q, k, v are one matrix, so are gate and up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.attention.interface import AttentionBackend, AttentionMetadata
from engine.models.config import ModelConfig
from engine.models.layers import Linear, RMSNorm, gated_silu, rotate
from engine.models.rope import rotary_table


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Keys and values of one layer, each [num_blocks, K, block_size, D], contiguous; with their scales where quantized."""

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None


@dataclass(frozen=True, slots=True)
class StepWeights:
    """Bytes that a step reads of the weights as they are held: quantized values with their scales, panels, biases, norms."""

    layers: int  # by every step
    head: int  # the final norm and the output head: by a step that computes logits
    embedding_row: int  # for each token


class StepDecoder(Protocol):
    """What a runner asks of a decoder; ``Decoder`` and ``engine.models.fused_cpu.FusedCpuDecoder`` are one."""

    config: ModelConfig

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        caches: list[LayerCache],
        meta: AttentionMetadata,
        attention: AttentionBackend,
    ) -> Tensor:
        """Hidden states [T, hidden] of a step's tokens, before the final norm; K and V are written to the caches."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [n, V] of the given rows of `forward`'s result, float32 (float64 for a float64 model)."""
        ...

    def step_weights(self) -> StepWeights:
        """What a step reads of the weights."""
        ...


class DecoderLayer(nn.Module):
    """Attention and gated MLP, each behind an RMSNorm, each added to the residual.

    The residual is carried beside the last addition to it, which the next norm makes in passing. With kernels a layer
    takes nine launches: norm, qkv, rotary with the KV store, attention, out, norm, gate_up, activation, down. Attention
    takes one more where it merges contexts that it had split, and one more in a mixed step.
    """

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        dtype: torch.dtype,
        device: torch.device,
        weight_device: torch.device,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_size = (
            config.num_heads,
            config.num_kv_heads,
            config.head_size,
        )
        self.window = config.sliding_windows[index]
        self.scale = config.head_size**-0.5
        self.invariant = False
        self.use_kernel = False
        q, kv = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
        hidden, inner, eps = config.hidden_size, config.intermediate_size, config.rms_norm_eps

        def linear(n_in: int, n_out: int, bias: bool) -> Linear:
            return Linear(n_in, n_out, bias=bias, dtype=dtype, device=device, weight_device=weight_device)

        def norm(size: int) -> RMSNorm:
            return RMSNorm(size, eps, dtype=dtype, device=device)

        self.input_norm, self.post_attention_norm = norm(hidden), norm(hidden)
        self.qkv = linear(hidden, q + 2 * kv, config.qkv_bias)
        self.q_norm = norm(config.head_size) if config.qk_norm else None
        self.k_norm = norm(config.head_size) if config.qk_norm else None
        self.out = linear(q, hidden, config.out_bias)
        self.gate_up = linear(hidden, 2 * inner, config.mlp_bias)
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
        """What this layer adds to the residual [T, hidden], after `x`, what the one before it adds, was added in place.

        `x` is None before the first layer. `rotary` [max_positions, D] holds cosines and sines by position.
        """
        x = self.input_norm(residual) if x is None else self.input_norm(x, residual)
        q = self._queries(self.qkv(x), positions, rotary, cache, meta, attention)
        mixed = attention.forward(
            q, cache.k, cache.v, meta, scale=self.scale, sliding_window=self.window, k_scale=cache.k_scale,
            v_scale=cache.v_scale,
        ).flatten(1)  # fmt: skip
        x = self.post_attention_norm(self.out(mixed), residual)
        inner = gated_silu(self.gate_up(x), invariant=self.invariant, use_kernel=self.use_kernel)
        down: Tensor = self.down(inner)
        return down

    def _queries(
        self,
        qkv: Tensor,
        positions: Tensor,
        rotary: Tensor,
        cache: LayerCache,
        meta: AttentionMetadata,
        attention: AttentionBackend,
    ) -> Tensor:
        """The queries [T, H, D] as attention takes them; keys and values go to the cache."""
        if self.use_kernel:
            from engine.kernels.rotary import rotate_and_store

            return rotate_and_store(
                qkv, rotary, positions, cache.k, cache.v, meta.slot_mapping, eps=self.input_norm.eps,
                q_norm=None if self.q_norm is None else self.q_norm.weight,
                k_norm=None if self.k_norm is None else self.k_norm.weight, k_scale=cache.k_scale, v_scale=cache.v_scale,
            )  # fmt: skip
        heads = qkv.view(qkv.shape[0], self.num_heads + 2 * self.num_kv_heads, self.head_size)
        q, k, v = torch.split(heads, [self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        table = rotary[positions]
        attention.store_kv(
            rotate(k, table), v, cache.k, cache.v, meta.slot_mapping, k_scale=cache.k_scale, v_scale=cache.v_scale
        )  # fmt: skip
        return rotate(q, table)


class Decoder(nn.Module):
    """A causal LM without its cache. Weights are uninitialised until the loader has filled `weight_targets`.

    `held_forms`: what a quantized checkpoint's layers may stay ("int4", "int8", "fp8"); their weights have no memory before
    the loader gives them some. None of them: it makes floats of all.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_positions: int,
        held_forms: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__()
        self.config = config
        self.held_forms = held_forms if config.quantization is not None else frozenset()
        weight_device = torch.device("meta") if self.held_forms else device
        self.embedding = nn.Parameter(
            torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device=device),
            requires_grad=False,
        )
        self.layers = nn.ModuleList(
            DecoderLayer(config, i, dtype, device, weight_device) for i in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device)
        self.lm_head = Linear(
            config.hidden_size, config.vocab_size, bias=False, dtype=dtype, device=torch.device("meta")
        )
        if config.tie_embeddings:
            self.lm_head.weight = self.embedding
        else:
            self.lm_head.weight = nn.Parameter(torch.empty_like(self.embedding), requires_grad=False)
        table_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.rotary = rotary_table(config.rope, config.head_size, max_positions, table_dtype).to(device)

    def use_kernels(self, *, deterministic: bool = False) -> None:
        """Take the Triton kernels: on a GPU, in the dtypes that attention has there too. Products stay the library's, but for
        `deterministic`, which no library promises to be."""
        for module in self.modules():
            if isinstance(module, RMSNorm | DecoderLayer):
                module.use_kernel = True
            elif isinstance(module, Linear):
                module.use_invariant_kernel = deterministic

    def set_row_tile(self, row_tile: int) -> None:
        """Make every row's result independent of the rows beside it, by products of exactly `row_tile` rows."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.row_tile = row_tile
            elif isinstance(module, DecoderLayer):
                module.invariant = row_tile > 0

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        caches: list[LayerCache],
        meta: AttentionMetadata,
        attention: AttentionBackend,
    ) -> Tensor:
        """Hidden states [T, hidden] of a step's tokens, before the final norm; K and V are written to the caches."""
        residual = F.embedding(token_ids, self.embedding)
        x: Tensor | None = None
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, residual, positions, self.rotary, cache, meta, attention)
        return residual if x is None else residual.add_(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [n, V] of the given rows of `forward`'s result, float32 (float64 for a float64 model)."""
        logits: Tensor = self.lm_head(self.norm(hidden))
        return logits if logits.dtype == torch.float64 else logits.float()

    def step_weights(self) -> StepWeights:
        """What a step reads of the weights; counts anew after they were quantized."""
        head = _num_bytes(self.norm) + _num_bytes(self.lm_head)
        return StepWeights(_num_bytes(self.layers), head, self.embedding[0].nbytes)

    def weight_targets(self) -> Iterator[tuple[str, Tensor]]:
        """Checkpoint tensor names, each with the view of the merged parameter that it fills."""
        yield "model.embed_tokens.weight", self.embedding
        yield "model.norm.weight", self.norm.weight
        if not self.config.tie_embeddings:
            yield "lm_head.weight", self.lm_head.weight
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            for name, target in _layer_targets(layer):
                yield f"model.layers.{index}.{name}", target


def _num_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def merged_linears(layer: DecoderLayer) -> dict[str, tuple[tuple[str, int], ...]]:
    """A layer's linear modules by name, each with the checkpoint's layers that it joins and their outputs."""
    q, kv = layer.num_heads * layer.head_size, layer.num_kv_heads * layer.head_size
    inner = layer.down.weight.shape[1]
    return {
        "qkv": (("self_attn.q_proj", q), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)),
        "out": (("self_attn.o_proj", layer.out.weight.shape[0]),),
        "gate_up": (("mlp.gate_proj", inner), ("mlp.up_proj", inner)),
        "down": (("mlp.down_proj", layer.down.weight.shape[0]),),
    }


def _layer_targets(layer: DecoderLayer) -> Iterator[tuple[str, Tensor]]:
    for module, parts in merged_linears(layer).items():
        linear, first = getattr(layer, module), 0
        for name, size in parts:
            yield f"{name}.weight", linear.weight[first : first + size]
            if linear.bias is not None:
                yield f"{name}.bias", linear.bias[first : first + size]
            first += size
    yield "input_layernorm.weight", layer.input_norm.weight
    yield "post_attention_layernorm.weight", layer.post_attention_norm.weight
    if layer.q_norm is not None and layer.k_norm is not None:
        yield "self_attn.q_norm.weight", layer.q_norm.weight
        yield "self_attn.k_norm.weight", layer.k_norm.weight
