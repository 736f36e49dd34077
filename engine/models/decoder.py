"""The decoder of the Llama-like families, one by configuration: ``engine.models.registry`` names them.

Boundary: token ids and positions of one flat step in, hidden states and logits out; K and V go through the attention
backend into caches that the runner owns. It knows no sequences, no scheduling and no files: `weight_targets` says where
each checkpoint tensor belongs, ``engine.models.weights`` fills it. q, k, v are one matrix, so are gate and up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.attention.interface import AttentionBackend, AttentionMetadata
from engine.models.config import ModelConfig
from engine.models.experts import SparseMlp
from engine.models.layers import LayerNorm, Linear, RMSNorm, alibi_slopes, gated, rotate, softcapped
from engine.models.neox import NeoXLayer
from engine.models.registry import TensorNames, family_of, parts_of
from engine.models.rope import rotary_table
from engine.models.rope_config import RopeConfig
from engine.models.shard import Shard, Split

HEAD_ROWS = 4096  # of a normalized head, at once: the copy stays small


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

    layers: int  # by every step; of experts, those that one token is given to
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

    def final_hidden(self, hidden: Tensor) -> Tensor:
        """The given rows of `forward`'s result after the final norm: what the output head multiplies, [n, hidden]."""
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
        weight_device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_size = (
            config.num_heads,
            config.num_kv_heads,
            config.head_size,
        )
        self.window = config.sliding_windows[index]
        self.scale, self.softcap = config.attention_scale, config.attention_softcap
        self.activation = config.activation
        self.alibi_slopes = alibi_slopes(config.num_heads).to(device) if config.has_alibi else None
        self.invariant = False
        self.use_kernel = False
        q, kv = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
        hidden, inner, eps = config.hidden_size, config.intermediate_size, config.rms_norm_eps

        def linear(n_in: int, n_out: int, bias: bool) -> Linear:
            return Linear(n_in, n_out, bias=bias, dtype=dtype, device=device, weight_device=weight_device)

        def norm(size: int) -> RMSNorm:
            return RMSNorm(size, eps, dtype=dtype, device=device, offset=config.norm_offset)

        self.input_norm, self.post_attention_norm = norm(hidden), norm(hidden)
        self.attention_out_norm = norm(hidden) if config.out_norms else None
        self.mlp_out_norm = norm(hidden) if config.out_norms else None
        self.qkv = linear(hidden, q + 2 * kv, config.qkv_bias)
        self.q_norm = norm(config.head_size) if config.qk_norm else None
        self.k_norm = norm(config.head_size) if config.qk_norm else None
        self.out = linear(q, hidden, config.out_bias)
        self.experts: SparseMlp | None = None
        if config.moe is not None and config.moe.layers[index]:
            self.experts = SparseMlp(config.moe, hidden, dtype=dtype, device=device)
        else:
            self.gate_up = linear(hidden, 2 * inner, config.mlp_bias)
            self.down = linear(inner, hidden, config.mlp_bias)

    def forward(
        self,
        x: Tensor | None,
        residual: Tensor,
        positions: Tensor,
        rotary: Tensor | None,
        cache: LayerCache,
        meta: AttentionMetadata,
        attention: AttentionBackend,
    ) -> Tensor:
        """What this layer adds to the residual [T, hidden], after `x`, what the one before it adds, was added in place.

        `x` is None before the first layer. `rotary` [max_positions, values that are turned] holds cosines and sines by
        position; None: there are none.
        """
        x = self.input_norm(residual) if x is None else self.input_norm(x, residual)
        q = self._queries(self.qkv(x), positions, rotary, cache, meta, attention)
        mixed = attention.forward(
            q, cache.k, cache.v, meta, scale=self.scale, sliding_window=self.window, softcap=self.softcap,
            alibi_slopes=self.alibi_slopes, k_scale=cache.k_scale, v_scale=cache.v_scale,
        ).flatten(1)  # fmt: skip
        x = self.out(mixed)
        if self.attention_out_norm is not None:
            x = self.attention_out_norm(x)
        x = self._mlp(self.post_attention_norm(x, residual))
        return x if self.mlp_out_norm is None else self.mlp_out_norm(x)

    def weight_targets(self, names: TensorNames) -> Iterator[tuple[str, Tensor]]:
        """Checkpoint tensor names within the layer, each with the view of the merged parameter that it fills."""
        for module, parts in self.merged_linears(names).items():
            yield from getattr(self, module).targets(parts)
        if self.experts is not None:
            yield from self.experts.weight_targets(names)
        norms = {
            names.input_norm: self.input_norm, names.mlp_norm: self.post_attention_norm,
            names.attention_out_norm or "-": self.attention_out_norm, names.mlp_out_norm or "-": self.mlp_out_norm,
            "self_attn.q_norm": self.q_norm, "self_attn.k_norm": self.k_norm,
        }  # fmt: skip
        for name, norm in norms.items():
            if norm is not None:
                yield from norm.targets(name)

    def merged_linears(self, names: TensorNames) -> dict[str, tuple[tuple[str, int], ...]]:
        """The linear modules by name, each with the checkpoint's layers that it joins and their outputs."""
        q, kv = self.num_heads * self.head_size, self.num_kv_heads * self.head_size
        hidden = self.out.weight.shape[0]
        merged = {"qkv": parts_of(names.qkv, (q, kv, kv)), "out": ((names.out, hidden),)}
        if self.experts is None:
            inner = self.down.weight.shape[1]
            merged["gate_up"] = parts_of(names.gate_up, (inner, inner))
            merged["down"] = ((names.down, hidden),)
        return merged

    def _mlp(self, x: Tensor) -> Tensor:
        if self.experts is not None:
            mixed: Tensor = self.experts(x)
            return mixed
        gate_up = self.gate_up(x)
        inner = gated(gate_up, self.activation, invariant=self.invariant, use_kernel=self.use_kernel)
        down: Tensor = self.down(inner)
        return down

    def _queries(
        self,
        qkv: Tensor,
        positions: Tensor,
        rotary: Tensor | None,
        cache: LayerCache,
        meta: AttentionMetadata,
        attention: AttentionBackend,
    ) -> Tensor:
        """The queries [T, H, D] as attention takes them; keys and values go to the cache."""
        if self.use_kernel and rotary is not None:
            from engine.kernels.rotary import rotate_and_store

            return rotate_and_store(
                qkv, rotary, positions, cache.k, cache.v, meta.slot_mapping, eps=self.input_norm.eps,
                norm_offset=self.input_norm.offset,
                q_norm=None if self.q_norm is None else self.q_norm.weight,
                k_norm=None if self.k_norm is None else self.k_norm.weight, k_scale=cache.k_scale, v_scale=cache.v_scale,
            )  # fmt: skip
        heads = qkv.view(qkv.shape[0], self.num_heads + 2 * self.num_kv_heads, self.head_size)
        q, k, v = torch.split(heads, [self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            table = rotary[positions]
            q, k = rotate(q, table), rotate(k, table)
        attention.store_kv(
            k, v, cache.k, cache.v, meta.slot_mapping, k_scale=cache.k_scale, v_scale=cache.v_scale
        )  # fmt: skip
        return q


class Decoder(nn.Module):
    """A causal LM without its cache. Weights are uninitialised until the loader has filled `weight_targets`.

    `held_forms`: what a quantized checkpoint's layers may stay ("int4", "int8", "fp8"); their weights have no memory before
    the loader gives them some. None of them: it makes floats of all. `shard`: which part of a model `config` is, where other
    ranks have the others; what they compute together needs `sum_over`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_positions: int,
        held_forms: frozenset[str] = frozenset(),
        shard: Shard | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self._shard = shard
        self.names = family_of([config.architecture]).names
        # Blocks of another shape have no products with quantized weights.
        is_held = config.quantization is not None and config.block == "llama"
        self.held_forms = held_forms if is_held else frozenset()
        weight_device = torch.device("meta") if self.held_forms else device
        self.embedding = nn.Parameter(
            torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device=device),
            requires_grad=False,
        )
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.norm: RMSNorm | LayerNorm
        if config.block == "neox":
            self.layers = nn.ModuleList(NeoXLayer(config, dtype, device) for _ in range(config.num_layers))
            self.norm = LayerNorm(hidden, eps, dtype=dtype, device=device)
        else:
            self.layers = nn.ModuleList(
                DecoderLayer(config, i, dtype, device, weight_device) for i in range(config.num_layers)
            )
            self.norm = RMSNorm(hidden, eps, dtype=dtype, device=device, offset=config.norm_offset)
        self.lm_head = Linear(
            config.hidden_size, config.vocab_size, bias=False, dtype=dtype, device=torch.device("meta")
        )
        if config.tie_embeddings:
            self.lm_head.weight = self.embedding
        else:
            self.lm_head.weight = nn.Parameter(torch.empty_like(self.embedding), requires_grad=False)
        table_dtype = torch.float64 if dtype == torch.float64 else torch.float32

        def table(rope: RopeConfig) -> Tensor:
            return rotary_table(rope, config.rotary_size, max_positions, table_dtype).to(device)

        self.rotary = table(config.rope) if config.rotary_size else None
        # Of layers with a window, where they have their own
        self.local_rotary = None if config.local_rope is None else table(config.local_rope)
        self.embedding_scale: Tensor | None = None
        if config.embedding_scale is not None:  # rounded as the checkpoints' own code does
            self.embedding_scale = torch.tensor(config.embedding_scale, dtype=torch.float32).to(device, dtype)
        self.invariant = False

    def use_kernels(self, *, deterministic: bool = False) -> None:
        """Take the Triton kernels: on a GPU, in the dtypes that attention has there too. Products stay the library's, but for
        `deterministic`, which no library promises to be."""
        for module in self.modules():
            if isinstance(module, RMSNorm | DecoderLayer | SparseMlp):
                module.use_kernel = True
            elif isinstance(module, Linear):
                module.use_invariant_kernel = deterministic

    def set_row_tile(self, row_tile: int) -> None:
        """Make every row's result independent of the rows beside it, by products of exactly `row_tile` rows."""
        self.invariant = row_tile > 0
        for module in self.modules():
            if isinstance(module, Linear | SparseMlp):
                module.row_tile = row_tile
            elif isinstance(module, DecoderLayer | NeoXLayer):
                module.invariant = row_tile > 0

    def sum_over(self, all_reduce: Callable[[Tensor], Tensor]) -> None:
        """Take `all_reduce` for the sums over all ranks, of which this decoder computes a part."""
        assert self._shard is not None, "the decoder is a whole model"
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer | NeoXLayer)
            layer.out.all_reduce = all_reduce
            if isinstance(layer, DecoderLayer) and layer.alibi_slopes is not None:
                slopes = alibi_slopes(self._shard.model.num_heads).to(layer.alibi_slopes.device)
                layer.alibi_slopes = self._shard.of_heads(slopes)
            mlp = layer.down if isinstance(layer, NeoXLayer) or layer.experts is None else layer.experts
            mlp.all_reduce = all_reduce

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
        if self.embedding_scale is not None:
            residual = residual * self.embedding_scale
        x: Tensor | None = None
        for layer, cache, window in zip(self.layers, caches, self.config.sliding_windows, strict=True):
            rotary = self.rotary if window is None or self.local_rotary is None else self.local_rotary
            x = layer(x, residual, positions, rotary, cache, meta, attention)
        return residual if x is None else residual.add_(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [n, V] of the given rows of `forward`'s result, float32 (float64 for a float64 model)."""
        logits: Tensor = self.lm_head(self.final_hidden(hidden))
        if self.config.logit_softcap is not None:
            logits = softcapped(logits, self.config.logit_softcap, invariant=self.invariant)
        return logits if logits.dtype == torch.float64 else logits.float()

    def final_hidden(self, hidden: Tensor) -> Tensor:
        """The given rows of `forward`'s result after the final norm, [n, hidden]."""
        normed: Tensor = self.norm(hidden)
        return normed

    def step_weights(self) -> StepWeights:
        """What a step reads of the weights; counts anew after they were quantized."""
        head = _num_bytes(self.norm) + _num_bytes(self.lm_head)
        idle = sum(module.idle_bytes for module in self.modules() if isinstance(module, SparseMlp))
        return StepWeights(_num_bytes(self.layers) - idle, head, self.embedding[0].nbytes)

    def matrices(self) -> list[Tensor]:
        """Matrices [out, in] of all shapes that the decoder multiplies with."""
        found = [module.weight for module in self.modules() if isinstance(module, Linear)]
        sparse = (module.matrices() for module in self.modules() if isinstance(module, SparseMlp))
        return [*found, *chain.from_iterable(sparse)]

    def weight_targets(self) -> Iterator[tuple[str, Tensor]]:
        """Checkpoint tensor names, each with the view of the merged parameter that it fills."""
        names = self.names
        yield f"{names.embedding}.weight", self.embedding
        yield from self.norm.targets(names.norm)
        if not self.config.tie_embeddings:
            yield f"{names.head}.weight", self.lm_head.weight
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer | NeoXLayer)
            for name, target in layer.weight_targets(names):
                yield f"{names.layers}.{index}.{name}", target

    def splits(self) -> dict[str, Split]:
        """Of which checkpoint tensors it holds a part, and which."""
        if self._shard is None:
            return {}
        each = dict(self._shard.layer_splits(self.names))
        prefixes = [f"{self.names.layers}.{index}" for index in range(len(self.layers))]
        return {f"{prefix}.{name}": split for prefix in prefixes for name, split in each.items()}

    def finish_loading(self) -> None:
        """To be called once all targets are filled: brings rows of a normalized head to length 1, as its training did."""
        if self.config.has_normalized_head:
            for rows in torch.split(self.lm_head.weight.data, HEAD_ROWS):
                rows.copy_(F.normalize(rows))

    def place_of(self, stored: str) -> str | None:
        """The target's name for a checkpoint's; None where the tensor is not part of the model, or is the head of tied embeddings."""
        name = self.names.of_file(stored)
        is_tied_head = name == f"{self.names.head}.weight" and self.config.tie_embeddings
        return None if is_tied_head else name


def _num_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
