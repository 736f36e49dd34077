"""LoRA on the GPU: the kernels against their definition at real sizes, and many adapters in captured, overlapping steps."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.bench.parts.random_engine import random_engine
from engine.bench.parts.shapes import TINY
from engine.engine import Engine
from engine.kernels.grouped_lora import lora_add
from engine.kernels.lora import SlotWeights, lora_add_ref, tokens_by_slot
from engine.models.lora import AdapterWeights, SlotLayout, scale_dtype
from engine.sampling_params import SamplingParams

NUM_SLOTS, RANK = 8, 16
# Of an 8B model: q, k and v; gate and up; down.
LAYERS = [(4096, (4096, 1024, 1024)), (4096, (12288, 12288)), (12288, (4096,))]


def layer(size_in: int, sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> SlotWeights:
    generator = torch.Generator(device).manual_seed(size_in)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    return SlotWeights(
        (draw(NUM_SLOTS, len(sizes) * RANK, size_in) * size_in**-0.5).to(dtype), draw(NUM_SLOTS, sum(sizes), RANK).to(dtype),
        draw(NUM_SLOTS, len(sizes)).abs() + 0.5, sizes,
    )  # fmt: skip


@pytest.mark.parametrize("shape", LAYERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_kernels_agree_with_the_definition_and_keep_a_tokens_bits(
    shape: tuple[int, tuple[int, ...]], dtype: torch.dtype, device: torch.device
) -> None:
    weights = layer(*shape, dtype, device)
    for tokens in (1, 9, 300):
        x, start = (torch.randn(tokens, size, device=device).to(dtype) for size in (shape[0], sum(shape[1])))
        slots = torch.arange(tokens, dtype=torch.int32, device=device) % (NUM_SLOTS + 1) - 1
        want, got = start.clone(), start.clone()
        lora_add_ref(want, x, weights, tokens_by_slot(slots, NUM_SLOTS))
        lora_add(got, x, weights, tokens_by_slot(slots, NUM_SLOTS))
        # x Aᵀ may round to a neighbour, one unit of each of RANK terms; the result is rounded once more.
        unit = torch.finfo(dtype).eps
        slack = 4 * unit * RANK**0.5 * weights.b.abs().max().item() + 1e-4
        torch.testing.assert_close(got, want, rtol=1.01 * unit, atol=slack)
        assert torch.equal(got[slots < 0], start[slots < 0])
        for rows in ([tokens - 1], list(range(tokens // 2, tokens))):
            some = start[rows].clone()
            lora_add(some, x[rows], weights, tokens_by_slot(slots[rows], NUM_SLOTS))
            assert torch.equal(some, got[rows])


def test_captured_launches_follow_the_slots_that_they_find(device: torch.device) -> None:
    weights = layer(*LAYERS[0], torch.bfloat16, device)
    x, y = (torch.randn(32, size, device=device).bfloat16() for size in (4096, 6144))
    slots, start = torch.zeros(32, dtype=torch.int32, device=device), y.clone()
    lora_add(y, x, weights, tokens_by_slot(slots, NUM_SLOTS))  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lora_add(y, x, weights, tokens_by_slot(slots, NUM_SLOTS))
    for number in range(3):
        slots.copy_((torch.arange(32) * (number + 1)) % (NUM_SLOTS + 1) - 1)
        y.copy_(start)
        want = start.clone()
        lora_add(want, x, weights, tokens_by_slot(slots, NUM_SLOTS))
        graph.replay()
        assert torch.equal(y, want)


def run(engine: Engine, requests: dict[str, tuple[list[int], str | None]]) -> tuple[dict[str, Any], set[int]]:
    """Tokens and log-probabilities by request, and the sizes of captured steps; requests arrive one a step."""
    params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, logprobs=0)
    waiting, found, sizes = dict(requests), {name: ([], []) for name in requests}, set()
    while waiting or engine.has_work:
        if waiting:
            name = next(iter(waiting))
            prompt, lora = waiting.pop(name)
            engine.add(engine.make_request(prompt, params, request_id=name, lora=lora))
        output = engine.step()
        for delta in output.deltas:
            assert delta.error is None, delta.error
            found[delta.request_id][0].extend(delta.token_ids)
            found[delta.request_id][1].extend(entry.logprob for entry in delta.logprobs)
        if output.record is not None:
            sizes.add(output.record.graph_size)
    engine.check_integrity()
    return found, sizes


@pytest.mark.parametrize("max_loras", [8, 3])
def test_a_request_gets_what_it_gets_alone_to_the_bit_and_memory_comes_back(
    max_loras: int, device: torch.device
) -> None:
    gc.collect()
    before = torch.cuda.memory_allocated(device)
    settings: dict[str, Any] = {
        "deterministic": True, "enable_lora": True, "max_loras": max_loras, "max_num_seqs": 32, "num_blocks": 256,
        "max_model_len": 512,
    }  # fmt: skip
    with random_engine(TINY, device, **settings) as engine:
        dtype = getattr(torch, engine.config.dtype)
        layout = SlotLayout(TINY.model, RANK)
        for number in range(8):
            values = torch.randn(layout.num_values, generator=torch.Generator().manual_seed(number)) / 8
            scales = torch.ones(layout.num_scales, dtype=scale_dtype(dtype))
            engine.add_lora(f"a{number}", AdapterWeights(values.to(dtype), scales, f"{number}", RANK))
        names = [None, *[f"a{number}" for number in range(8)]]
        requests = {f"{name} {i}": ([7, i, 3, 11], name) for i in range(2) for name in names}
        together, sizes = run(engine, requests)
        assert max(sizes) >= 8, "no captured step of many rows"
        assert len({tuple(tokens) for tokens, _ in together.values()}) >= 9, "the adapters make no difference"
        for name, request in requests.items():
            assert run(engine, {name: request})[0][name] == together[name], name
    assert torch.cuda.memory_allocated(device) == before
