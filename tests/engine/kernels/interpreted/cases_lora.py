"""LoRA over many adapters against its definition, and its promise: a token's bits do not depend on what shares its step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.kernels.grouped_lora import lora_add
from engine.kernels.lora import SlotWeights, TokenSlots, lora_add_ref, tokens_by_slot

NUM_SLOTS = 3
# (in, outputs of each part, rank): three parts that fill no tile; splits of `in`; one part of whole tiles; a rank of two tiles.
LAYERS = [(40, (48, 16, 16), 8), (1040, (20, 36), 16), (64, (128,), 16), (48, (24,), 128)]


def layer(size_in: int, sizes: tuple[int, ...], rank: int, dtype: torch.dtype) -> SlotWeights:
    """Slots that lie in one run of memory with others' values between them, as those of an engine do."""
    generator = torch.Generator().manual_seed(size_in + rank)
    size_a, size_b = len(sizes) * rank * size_in, sum(sizes) * rank
    flat = torch.randn(NUM_SLOTS, size_a + size_b + 16, generator=generator) * size_in**-0.5
    flat = flat.to(dtype)
    a = flat[:, :size_a].view(NUM_SLOTS, -1, size_in)
    b = flat[:, size_a : size_a + size_b].view(NUM_SLOTS, -1, rank)
    scales = torch.rand(NUM_SLOTS, len(sizes) + 2, generator=generator)[:, 1:-1] + 0.5
    return SlotWeights(a, b, scales, sizes)


def values(tokens: int, size: int, dtype: torch.dtype) -> Tensor:
    """Rows further apart than wide."""
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(tokens, 2 * size, generator=generator).to(dtype)[:, :size]


def slots_of(tokens: int) -> Tensor:
    """No adapter, the first and the last slot in turn, but more of the last; nobody uses the one between."""
    return torch.tensor([(-1, 0, 2, 2)[i % 4] for i in range(tokens)], dtype=torch.int32)


# float32 takes small tiles, many programs for the interpreter: two layers, of which one splits its sum.
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(shape, torch.bfloat16) for shape in LAYERS]
    + [(LAYERS[0], torch.float16), (LAYERS[1], torch.float32), (LAYERS[2], torch.float32)],
)
def test_agrees_with_the_definition(shape: tuple[int, tuple[int, ...], int], dtype: torch.dtype) -> None:
    weights, tokens = layer(*shape, dtype), 37
    x, y = values(tokens, shape[0], dtype), values(tokens, sum(shape[1]), dtype)
    slots, want = slots_of(tokens), y.clone()
    before = y.clone()
    lora_add_ref(want, x, weights, tokens_by_slot(slots, NUM_SLOTS))
    lora_add(y, x, weights, tokens_by_slot(slots, NUM_SLOTS))
    # Sums of float32 in another order may round a value of x Aᵀ, which is about 1, to its neighbour: one unit of each of
    # `rank` independent terms, four deviations of their sum. The result is rounded once more.
    unit = torch.finfo(dtype).eps
    slack = 4 * unit * shape[2] ** 0.5 * weights.b.abs().max().item() + 1e-5
    torch.testing.assert_close(y.float(), want.float(), rtol=1.01 * unit, atol=slack)
    assert torch.equal(y[slots < 0], before[slots < 0]), "tokens without an adapter keep their bits"
    assert not torch.equal(y[slots >= 0], before[slots >= 0])


def test_a_wrong_slot_would_be_seen() -> None:
    """The tolerance above is far below what another adapter makes."""
    weights, x = layer(*LAYERS[0], torch.float32), values(8, 40, torch.float32)
    results = []
    for slot in range(NUM_SLOTS):
        y = torch.zeros(8, 80)
        lora_add(y, x, weights, tokens_by_slot(torch.full((8,), slot, dtype=torch.int32), NUM_SLOTS))
        results.append(y)
    assert (results[0] - results[1]).abs().median() > 0.05
    assert (results[0] - results[2]).abs().median() > 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_keeps_its_bits_alone_and_in_other_batches(dtype: torch.dtype) -> None:
    shape = LAYERS[1]
    weights, tokens = layer(*shape, dtype), 35
    x, start = values(tokens, shape[0], dtype), values(tokens, sum(shape[1]), dtype)
    slots, together = slots_of(tokens), start.clone()
    lora_add(together, x, weights, tokens_by_slot(slots, NUM_SLOTS))
    for rows in ([1], [34], list(range(34, -1, -1))):
        some = start[rows].clone()
        lora_add(some, x[rows], weights, tokens_by_slot(slots[rows], NUM_SLOTS))
        assert torch.equal(some, together[rows]), rows


def test_no_tokens_and_no_adapters_are_no_work() -> None:
    weights = layer(*LAYERS[0], torch.float32)
    nothing = torch.empty(0, dtype=torch.int32)
    lora_add(
        torch.empty(0, 80),
        torch.empty(0, 40),
        weights,
        TokenSlots(nothing, torch.zeros(4, dtype=torch.int32)),
    )
    y = values(5, 80, torch.float32)
    before = y.clone()
    lora_add(
        y,
        values(5, 40, torch.float32),
        weights,
        tokens_by_slot(torch.full((5,), -1, dtype=torch.int32), NUM_SLOTS),
    )
    assert torch.equal(y, before)
