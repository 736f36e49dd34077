"""What a step needs, against counts from first principles: tensors' bytes, torch's count of operations, brute force."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from engine.kernels.quantized_weight import quantize_fp8, quantize_int4, quantize_int8
from engine.memory import make_kv_spec
from engine.models.decoder import Decoder, StepWeights
from engine.models.quantized import QuantizedLinear
from engine.runner.model_runner import ModelRunner
from engine.runner.step_cost import StepCost

PROMPT = [5, 9, 2, 44, 17, 3, 8, 25, 30, 1, 12]
QUANTIZERS = {"int8": quantize_int8, "int4": quantize_int4, "fp8": quantize_fp8}


def test_bytes_are_those_of_the_tensors_that_the_step_touches(plans: Any, tiny_decoder: Any) -> None:
    decoder = tiny_decoder(torch.float32)
    config = decoder.config
    cost = StepCost(config, make_kv_spec(config, 4, torch.float32), decoder.step_weights())
    names = dict(decoder.named_parameters())
    layers = sum(each.nbytes for name, each in names.items() if name.startswith("layers."))
    head = names["lm_head.weight"].nbytes + names["norm.weight"].nbytes
    row = 4 * config.hidden_size
    token = 2 * 2 * 8 * 4 * config.num_layers  # K and V, 2 heads of 8, float32
    prefill = cost.of(plans.plan_of(0, [(0, 0, 11)]))  # not the prompt's end: nothing is sampled
    assert (prefill.weight_bytes, prefill.kv_bytes) == (layers + 11 * row, 11 * token + 11 * token)
    decode = cost.of(plans.plan_of(1, [(0, 20, 1), (1, 4, 1)], samples=[0, 1]))
    assert (decode.weight_bytes, decode.kv_bytes) == (layers + head + 2 * row, (21 + 5) * token + 2 * token)
    scored = cost.of(plans.plan_of(2, [(0, 0, 11)]), num_prompt_logits=10)
    assert scored.weight_bytes == prefill.weight_bytes + head
    assert scored.linear_flops == prefill.linear_flops + 10 * 2 * config.vocab_size * config.hidden_size


@pytest.mark.parametrize("method", QUANTIZERS)
def test_quantized_layers_count_packed_values_and_scales(method: str, tiny_decoder: Any) -> None:
    decoder = tiny_decoder(torch.float32)
    expected = 0
    for layer in decoder.layers:
        for name, child in list(layer.named_children()):
            if name.endswith("norm"):
                expected += child.weight.nbytes
                continue
            weight = QUANTIZERS[method](child.weight.data)
            parts = (weight.values, weight.scales, getattr(weight, "zeros", None))
            expected += sum(part.nbytes for part in parts if part is not None)
            setattr(layer, name, QuantizedLinear(weight, None, deterministic=False))
    assert decoder.step_weights().layers == expected


def counted(runner: ModelRunner, plan: Any) -> tuple[int, int]:
    """Floating-point operations of a step on the torch path: (as torch counts them, as its record says)."""
    with FlopCounterMode(display=False) as counter:
        runner.submit(plan)
    result = runner.collect()
    return counter.get_total_flops(), result.flops_needed


def test_operations_are_those_that_torch_counts(
    make_runner: Callable[..., ModelRunner], plans: Any, tiny_decoder: Callable[..., Decoder]
) -> None:
    runner, config = make_runner(), tiny_decoder().config
    admitted = [plans.admit(0, PROMPT, [1, 2, 3]), plans.admit(1, PROMPT[:5], [4, 5])]
    prefill = plans.plan_of(0, [(0, 0, 11), (1, 0, 5)], samples=[0, 1], admitted=admitted)
    found, needed = counted(runner, prefill)
    # The reference multiplies each query with every key of its row and hides those to come; causal attention needs half.
    pair = 4 * config.num_heads * config.head_size * config.num_layers
    assert found - needed == pair * ((11 * 11 - 11 * 12 // 2) + (5 * 5 - 5 * 6 // 2))
    # A decoding query sees all keys of its row: nothing is hidden. The reference pads the rows to the longest.
    found, needed = counted(runner, plans.plan_of(1, [(0, 11, 1)], samples=[0]))
    assert found == needed
    found, needed = counted(
        runner, plans.plan_of(2, [(0, 12, 1), (1, 5, 1)], samples=[0, 1], new_blocks={0: [6]})
    )
    assert found - needed == pair * (13 - 6)


@pytest.mark.parametrize("window", [1, 4, 6, 100])
def test_windows_count_exactly_the_pairs_and_keys_inside(window: int, plans: Any, tiny_decoder: Any) -> None:
    config = replace(tiny_decoder().config, sliding_windows=(None, window))
    cost = StepCost(config, make_kv_spec(config, 4, torch.float32), StepWeights(0, 0, 0))
    rows = [(0, 20, 1), (1, 4, 3), (2, 0, 7), (3, 3, 9)]
    keys = pairs = 0
    for size in (10**9, window):
        for _, start, count in rows:
            seen = [set(range(max(0, at - size + 1), at + 1)) for at in range(start, start + count)]
            pairs += sum(map(len, seen))
            keys += len(set().union(*seen))
    needs = cost.of(plans.plan_of(0, rows))
    tokens, layer_token = 20, 2 * 2 * 8 * 4
    assert needs.kv_bytes == keys * layer_token + tokens * 2 * layer_token
    assert needs.attention_flops == 4 * config.num_heads * config.head_size * pairs
