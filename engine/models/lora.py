"""LoRA in a decoder: slots on the device that hold the adapters of a batch, and linear layers that add what these make.

Every slot has room for A and B of all linear layers at the engine's `max_lora_rank`, in one run of memory: an adapter
comes in with one copy. While no token of a step uses an adapter, a layer computes what it would compute without slots.

Boundary: the decoder's arithmetic, operation by operation; as one call on a CPU: `engine.models.fused_cpu`. Files: `engine.models.lora_files`. Which adapter is in which slot, and which row uses
it: ``engine.runner.adapters``.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor, nn

from engine.kernels.invariant import find_row_tile
from engine.kernels.lora import SlotWeights, TokenSlots, lora_add_ref
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.models.registry import family_of, parts_of
from engine.runner.host_zeros import host_zeros

ALIGNMENT = 16  # values: what Triton compiles for starts at multiples of 16 bytes


@dataclass(frozen=True, slots=True)
class Target:
    """A linear layer of the decoder, and the projections of checkpoints that it merges, each with its outputs."""

    name: str  # the attribute of DecoderLayer
    size_in: int
    parts: tuple[tuple[str, int], ...]

    @property
    def size_out(self) -> int:
        return sum(size for _, size in self.parts)


def lora_targets(model: ModelConfig) -> tuple[Target, ...]:
    """What adapters may change in each layer: of a layer with experts, the attention."""
    hidden, inner = model.hidden_size, model.intermediate_size
    q, kv = model.num_heads * model.head_size, model.num_kv_heads * model.head_size
    names = family_of([model.architecture]).names
    attention = (
        Target("qkv", hidden, parts_of(names.qkv, (q, kv, kv))),
        Target("out", q, ((names.out, hidden),)),
    )
    if model.moe is not None:
        return attention
    up = Target("gate_up", hidden, parts_of(names.gate_up, (inner, inner)))
    if model.block == "neox":
        up = Target("up", hidden, ((names.gate_up[0], inner),))
    return (
        *attention,
        up,
        Target("down", inner, ((names.down, hidden),)),
    )


@dataclass(frozen=True, slots=True)
class Place:
    """One projection of one layer within a slot."""

    size_in: int
    size_out: int
    a: int  # offset of A [R, in] among the slot's values
    b: int  # offset of B [out, R]
    scale: int  # index among the slot's scales


class SlotLayout:
    """Where a slot of rank R keeps what: for each layer and target A of all parts, then B of all parts."""

    def __init__(self, model: ModelConfig, rank: int) -> None:
        self.rank = rank
        self.targets = lora_targets(model)
        layers = family_of([model.architecture]).names.layers
        self.starts: list[
            tuple[int, int]
        ] = []  # offsets of A and B: targets of the first layer, of the second, …
        self.places: dict[str, Place] = {}  # by the checkpoint's name of the module
        at = 0
        for layer in range(model.num_layers):
            for target in self.targets:
                begin, at = at, at + _aligned(len(target.parts) * rank * target.size_in)
                self.starts.append((begin, at))
                first = 0
                for number, (name, size) in enumerate(target.parts):
                    self.places[f"{layers}.{layer}.{name}"] = Place(
                        target.size_in, size, begin + number * rank * target.size_in, at + first * rank, len(self.places)
                    )  # fmt: skip
                    first += size
                at += _aligned(target.size_out * rank)
        self.num_values = at
        self.num_scales = len(self.places)


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """An adapter in host memory, laid out as a slot is."""

    values: Tensor  # [num_values] in the engine's dtype
    scales: Tensor  # [num_scales]
    digest: str  # of the files' content
    rank: int  # the largest of its modules

    @property
    def num_bytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which scales are kept and sums are taken."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def slots_bytes(model: ModelConfig, dtype: torch.dtype, *, max_loras: int, max_rank: int) -> int:
    """Bytes of all slots of an engine."""
    layout = SlotLayout(model, max_rank)
    return max_loras * (layout.num_values * dtype.itemsize + layout.num_scales * scale_dtype(dtype).itemsize)


class LoraSlots:
    """The slots of one decoder.

    `layers` are the views of each linear layer: targets of the first decoder layer, of the second, …. `tokens` says which
    token of the step at hand uses which slot; None: no token uses one. The runner sets it before each forward pass.
    """

    def __init__(
        self, model: ModelConfig, *, max_loras: int, max_rank: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.layout = SlotLayout(model, max_rank)
        self.max_loras, self.dtype, self.device = max_loras, dtype, device
        self.tokens: TokenSlots | None = None
        self.use_kernel = False
        self.row_tile = 0
        shape = (max_loras, self.layout.num_values)
        on_cpu = device.type == "cpu"  # where slots take no memory until an adapter comes in
        self._values = host_zeros(shape, dtype) if on_cpu else torch.zeros(shape, dtype=dtype, device=device)
        self._scales = torch.zeros(max_loras, self.layout.num_scales, dtype=scale_dtype(dtype), device=device)
        self.layers = self._layers()

    def put(self, slot: int, weights: AdapterWeights) -> None:
        """Copy an adapter into a slot, after what the device was asked to do before."""
        self._values[slot].copy_(weights.values, non_blocking=True)
        self._scales[slot].copy_(weights.scales, non_blocking=True)

    def attach(self, decoder: Decoder, *, use_kernel: bool, deterministic: bool) -> None:
        """Make the linear layers of a decoder that runs operation by operation add what the adapters make."""
        self.use_kernel = use_kernel
        if deterministic and not use_kernel:
            matrices = [m for w in self.layers for m in (w.a[0], *torch.split(w.b[0], list(w.sizes)))]
            self.row_tile = find_row_tile([m.new_empty(m.shape, dtype=self._scales.dtype) for m in matrices])
        weights = iter(self.layers)
        for layer in decoder.layers:
            for target in self.layout.targets:
                setattr(layer, target.name, LoraLinear(getattr(layer, target.name), self, next(weights)))

    def _layers(self) -> list[SlotWeights]:
        made: list[SlotWeights] = []
        targets, first_scale = cycle(self.layout.targets), 0
        for (a, b), target in zip(self.layout.starts, targets, strict=False):
            made.append(self._weights(target, a, b, first_scale))
            first_scale += len(target.parts)
        return made

    def _weights(self, target: Target, a: int, b: int, scale: int) -> SlotWeights:
        slots, rank, parts = self.max_loras, self.layout.rank, len(target.parts)
        size_a, size_b = parts * rank * target.size_in, target.size_out * rank
        return SlotWeights(
            self._values[:, a : a + size_a].view(slots, parts * rank, target.size_in),
            self._values[:, b : b + size_b].view(slots, target.size_out, rank),
            self._scales[:, scale : scale + parts],
            tuple(size for _, size in target.parts),
        )

    @property
    def adapter_bytes(self) -> int:
        """Bytes of one adapter, in a slot or in host memory."""
        return self._values[0].nbytes + self._scales[0].nbytes

    @property
    def num_bytes(self) -> int:
        """Bytes of all slots."""
        return self.max_loras * self.adapter_bytes


class LoraLinear(nn.Module):
    """A linear layer, of whatever precision, and what the adapters of its tokens add."""

    def __init__(self, base: nn.Module, slots: LoraSlots, weights: SlotWeights) -> None:
        super().__init__()
        self.base = base
        self.values = weights.a  # a view of all slots' memory: whoever counts a module's bytes finds it
        self._slots = slots
        self._weights = weights

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        slots = self._slots
        if slots.tokens is None:
            return y
        if slots.use_kernel:
            from engine.kernels.grouped_lora import lora_add

            lora_add(y, x, self._weights, slots.tokens)
        else:
            lora_add_ref(y, x, self._weights, slots.tokens, row_tile=slots.row_tile)
        return y


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
