"""Shard: which part of a model one rank of tensor parallel computes, as a model of its own shape and as slices of a checkpoint.

Of every layer a rank has some of the heads and some of the values between the matrices of the MLP, of each expert too. What goes
into these is split by outputs (q, k, v, gate, up), what comes out of them by inputs (attention's output, down): the sum of
that over all ranks is the layer's. Fewer KV heads than ranks are held by several ranks each. Embedding, norms, routers and biases
of sums are on every rank, the output head on rank 0 alone.

Boundary: shapes and slices of plain checkpoints; it neither communicates nor reads files.
Source: Megatron-LM (Shoeybi et al. 2019), section 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.models.config import ModelConfig
from engine.models.moe_config import MoeConfig
from engine.models.registry import TensorNames
from engine.models.transformers_config import TransformersConfig


@dataclass(frozen=True, slots=True)
class Split:
    """The part of a stored tensor that a rank holds: pieces (first, count) along one dimension, side by side."""

    dim: int
    pieces: tuple[tuple[int, int], ...]
    stored: int  # the dimension's size in the checkpoint

    def stored_shape(self, held: torch.Size) -> torch.Size:
        """The shape in the checkpoint of what is held in this shape."""
        return torch.Size((*held[: self.dim], self.stored, *held[self.dim + 1 :]))

    def part(self, stored: Tensor) -> Tensor:
        """What the rank holds of it: a view where it is one piece, so that nothing else is read of a mapped file."""
        parts = [stored.narrow(self.dim, first, count) for first, count in self.pieces]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)


@dataclass(frozen=True, slots=True)
class Shard:
    """Rank `rank` of `size`. Make it with `shard_of`, which refuses what cannot be split."""

    model: ModelConfig  # the whole
    rank: int
    size: int

    @property
    def share(self) -> ModelConfig:
        """The rank's part as a model: what its decoder, its KV cache and its memory are made for."""
        model = self.model
        if self.size == 1:
            return model
        moe = model.moe
        if moe is not None:
            moe = replace(
                moe, intermediate_size=moe.intermediate_size // self.size, shared_size=moe.shared_size // self.size
            )  # fmt: skip
        share = replace(
            model, moe=moe, num_heads=model.num_heads // self.size, num_kv_heads=max(1, model.num_kv_heads // self.size),
            intermediate_size=model.intermediate_size // self.size,
        )  # fmt: skip
        # Rank 0 chooses for all: to the others the head is as if it were the embedding.
        return share if self.rank == 0 else replace(share, tie_embeddings=True, has_normalized_head=False)

    def of_heads(self, values: Tensor) -> Tensor:
        """Of one value for each query head, this rank's."""
        count = self.model.num_heads // self.size
        return values[self.rank * count : (self.rank + 1) * count]

    def layer_splits(self, names: TensorNames) -> Iterator[tuple[str, Split]]:
        """The checkpoint's tensors within a layer that are split, whether or not a layer has them."""
        model = self.model
        q, kv = model.num_heads * model.head_size, model.num_kv_heads * model.head_size
        heads: tuple[tuple[int, int], ...] = (
            (q, self.size),
            (kv, min(self.size, model.num_kv_heads)),
            (kv, min(self.size, model.num_kv_heads)),
        )
        if model.block == "neox":  # each head's query, key and value lie side by side
            heads = ((3 * q, self.size),)
        yield from self._by_outputs(names.qkv, heads)
        yield f"{names.out}.weight", self._by_inputs(q)
        inner = ((model.intermediate_size, self.size),) * (1 if model.block == "neox" else 2)
        yield from self._by_outputs(names.gate_up, inner)
        yield f"{names.down}.weight", self._by_inputs(model.intermediate_size)
        if model.moe is not None:
            yield from self._expert_splits(names, model.moe)

    def _expert_splits(self, names: TensorNames, moe: MoeConfig) -> Iterator[tuple[str, Split]]:
        mlps = [
            (tuple(n.format(i) for n in names.expert), moe.intermediate_size) for i in range(moe.num_experts)
        ]
        if moe.shared_size:
            each = tuple(f"{names.shared_expert}.{part}_proj" for part in ("gate", "up", "down"))
            mlps.append((each, moe.shared_size))
        for (*into, out), size in mlps:
            yield from self._by_outputs(tuple(into), ((size, self.size),) * 2)
            yield f"{out}.weight", self._by_inputs(size)

    def _by_outputs(
        self, names: tuple[str, ...], sections: tuple[tuple[int, int], ...]
    ) -> Iterator[tuple[str, Split]]:
        """Projections of these outputs, each with the number of its different parts; one name: they are stored as one."""
        merged = [sections] if len(names) == 1 else [(section,) for section in sections]
        for name, joined in zip(names, merged, strict=True):
            for part in ("weight", "bias"):
                yield f"{name}.{part}", self._split(0, joined)

    def _by_inputs(self, size: int) -> Split:
        return self._split(1, ((size, self.size),))

    def _split(self, dim: int, sections: tuple[tuple[int, int], ...]) -> Split:
        pieces, first = [], 0
        for size, num_parts in sections:
            count = size // num_parts
            pieces.append((first + self.rank * num_parts // self.size * count, count))
            first += size
        return Split(dim, tuple(pieces), first)


def shard_of(model: ModelConfig, rank: int, size: int) -> Shard:
    """A rank's part of a model.

    Raises:
        ConfigError: this model cannot be split over so many ranks, and what can be.
    """
    shard = Shard(model, rank, size)
    if size == 1:
        return shard
    if isinstance(model, TransformersConfig) or model.quantization is not None:
        what = "is computed by transformers' code" if model.quantization is None else "has quantized weights"
        raise _wrong(size, f"this {model.architecture} {what}, which is not split", 1)
    sizes = {"num_attention_heads": model.num_heads, "intermediate_size": model.intermediate_size}
    if model.moe is not None:
        sizes |= {
            "size of an expert": model.moe.intermediate_size,
            "size of the shared expert": model.moe.shared_size,
        }
        if all(model.moe.layers):
            del sizes["intermediate_size"]
    for name, value in sizes.items():
        if value % size:
            raise _wrong(size, f"{name} {value} is not a multiple of it", value)
    if model.num_kv_heads % size and size % model.num_kv_heads:
        limit = model.num_kv_heads
        raise _wrong(size, f"num_key_value_heads {limit} is neither a multiple nor a divisor of it", limit)
    return shard


def _wrong(size: int, why: str, limit: int) -> ConfigError:
    return ConfigError(
        f"tensor_parallel_size {size}: {why}", value=size, limit=limit, param="tensor_parallel_size",
        remedy="Set tensor_parallel_size=1." if limit == 1 else "Set a divisor of it, or 1.",
    )  # fmt: skip
