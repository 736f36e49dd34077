"""The arithmetic that benchmarks are judged by: floors, phases, KV waste, bars."""

from __future__ import annotations

import pytest
import torch

from engine.bench.nano import nano_workload
from engine.bench.parts.floors import ModelCost
from engine.bench.parts.phases import idle_share, phases
from engine.bench.parts.random_engine import random_engine
from engine.bench.parts.report import Bar, print_table
from engine.bench.parts.shapes import LLAMA_8B, QWEN3_8B, QWEN3_600M, TINY
from engine.bench.parts.workload import equal_requests, run_workload
from engine.bench.serve_8b import serve_workload
from engine.kv_waste import kv_waste
from engine.limits import Limits
from engine.records import StepRecord

H200 = Limits(bytes_s=4.3e12, flops_s=790e12)  # the rates that the published floors were worked out with
CPU = torch.device("cpu")


def test_floor_of_serve_8b_is_the_published_one():
    _, workload = serve_workload(is_tiny=False)
    floor = ModelCost(QWEN3_8B.model).workload(H200, workload.lengths)
    # Given with one decimal; the target of 85 % was given as 27.7 s.
    assert floor.seconds == pytest.approx(23.5, abs=0.05)
    assert floor.seconds / 27.7 == pytest.approx(0.85, abs=0.005)


def test_nano_draws_the_published_requests_and_their_floor():
    _, workload = nano_workload(is_tiny=False)
    assert workload.num_output_tokens == 133_966
    assert len(workload.prompts) == 256
    assert {100 <= n <= 1024 for pair in workload.lengths for n in pair} == {True}
    floor = ModelCost(QWEN3_600M.model).workload(H200, workload.lengths)
    # "About 36k tokens/s": two digits.
    assert workload.num_output_tokens / floor.seconds == pytest.approx(36_000, rel=0.5 / 36)


def test_decode_floor_by_hand():
    # Llama-3.1-8B: 32 layers of 4096·(4096 + 2·1024) + 4096² + 3·4096·14336 weights and two norms, final norm, head of 128256.
    products = 32 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336) + 128256 * 4096
    parameters = products + 32 * 2 * 4096 + 4096
    cost = ModelCost(LLAMA_8B.model)
    assert cost.parameters == parameters
    assert cost.kv_token_bytes == 2 * 32 * 8 * 128 * 2
    reading, multiplying = 2 * parameters / 4.3e12, 2 * products / 790e12
    kv = 131072 / 4.3e12
    assert cost.decode_s(H200, 1, 100) == pytest.approx(reading + 100 * kv)
    assert cost.decode_s(H200, 1000, 5000) == pytest.approx(1000 * multiplying + 5000 * kv)


def test_quantized_weights_count_with_their_bits_and_the_head_with_its_own():
    whole, half = ModelCost(LLAMA_8B.model), ModelCost(LLAMA_8B.model, weight_bits=8)
    head = 2 * LLAMA_8B.model.vocab_size * LLAMA_8B.model.hidden_size
    assert half.weight_bytes - head == pytest.approx((whole.weight_bytes - head) / 2)


def test_prefill_floor_counts_half_the_square_and_one_head_a_prompt():
    slow_reads = Limits(bytes_s=1e30, flops_s=1.0)  # seconds are operations
    model, cost = TINY.model, ModelCost(TINY.model)
    body = 2 * model.num_layer_products
    square = 4 * model.num_layers * model.num_heads * model.head_size
    expected = body * 100 + 2 * cost.head_parameters + square * 100 * 100 / 2
    assert cost.prefill_s(slow_reads, [(0, 100)]) == pytest.approx(expected)
    # A cached beginning leaves out its own tokens and pairs, and nothing else.
    beginning = cost.prefill_s(slow_reads, [(0, 90)])
    rest = cost.prefill_s(slow_reads, [(90, 10)])
    assert beginning + rest == pytest.approx(expected + 2 * cost.head_parameters)


def test_workload_floor_decodes_only_who_still_runs():
    cost = ModelCost(TINY.model)
    floor = cost.workload(H200, [(10, 1), (20, 3)])
    # The first output token is the prefill's. The second request decodes two more, over 21 and 22 tokens.
    assert floor.decode_s == pytest.approx(cost.decode_s(H200, 1, 21) + cost.decode_s(H200, 1, 22))
    assert floor.prefill_s == pytest.approx(cost.prefill_s(H200, [(0, 10), (0, 20)]))


@pytest.mark.parametrize(("stored", "kv_dtype_bytes"), [("auto", 4), ("fp8", 1)])
def test_step_records_of_an_engine_agree_with_the_floors_costs(stored, kv_dtype_bytes):
    cost = ModelCost(TINY.model, dtype_bytes=4, kv_dtype_bytes=kv_dtype_bytes)
    with random_engine(TINY, CPU, max_num_seqs=2, max_model_len=64, kv_cache_dtype=stored) as engine:
        steps = run_workload(engine, equal_requests("two", 2, 20, 4, 512)).steps
    assert [step.num_prefill_tokens for step in steps] == [40, 0, 0, 0]
    for i, step in enumerate(steps[1:], start=1):
        contexts = 2 * (20 + i)
        new = 2 * cost.kv_token_bytes  # the step also writes each row's newest keys and values
        gathered = 2 * TINY.model.hidden_size * 4  # of the input embedding
        assert step.weight_bytes == cost.weight_bytes + gathered
        assert step.bytes_needed == step.weight_bytes + contexts * cost.kv_token_bytes + new
        pairs = TINY.model.num_layers * TINY.model.num_heads * TINY.model.head_size * contexts
        products = TINY.model.num_layer_products + cost.head_parameters
        assert (step.flops_needed, step.attention_flops) == (2 * products * 2 + 4 * pairs, 4 * pairs)


def step(step_id: int, started_ms: float, ended_ms: float, **figures: object) -> StepRecord:
    values = {
        "schedule_ms": 0.1, "prepare_ms": 0.2, "forward_ms": 1.0, "sample_ms": 0.0, "rows": (("r", 1),),
        "num_prefill_tokens": 0, "num_decode_tokens": 1, "num_waiting": 0, "num_running": 1, "num_free_blocks": 0,
        "num_cached_blocks": 0,
    }  # fmt: skip
    return StepRecord(step_id, int(started_ms * 1e6), int(ended_ms * 1e6), **values | figures)


def test_phases_add_up_to_the_run_and_name_what_bounds_them():
    weights, kv_bytes = 10**6, 3 * 10**6
    limits = Limits(bytes_s=1e9, flops_s=1e12)  # 1 and 3 ms a step
    steps = [
        step(0, 0, 10, num_prefill_tokens=64, num_decode_tokens=0, forward_ms=9.0, flops_needed=int(8e9),
             bytes_needed=weights, weight_bytes=weights),
        step(1, 5, 16, forward_ms=5.0, bytes_needed=weights + kv_bytes, weight_bytes=weights),  # planned while step 0 ran
        step(2, 17, 22, forward_ms=5.0, bytes_needed=weights + kv_bytes, weight_bytes=weights),
    ]  # fmt: skip
    prefill, decode = phases(steps, limits)
    assert prefill.spent.wall_s + decode.spent.wall_s == pytest.approx(0.022)
    assert (prefill.name, prefill.spent.bound) == ("prefill", "compute")
    assert prefill.spent.floor_s == pytest.approx(0.008)
    assert (decode.name, decode.spent.bound, decode.spent.num_steps) == ("decode", "KV", 2)
    assert decode.spent.host_s == pytest.approx(0.002)
    assert decode.spent.floor_s == pytest.approx(2 * (0.001 + 0.003), rel=1e-6)
    assert idle_share(steps) == pytest.approx(1 - 19 / 22)


def test_a_phase_that_mostly_waits_is_bound_by_the_host():
    limits = Limits(bytes_s=1e9, flops_s=1e12)
    steps = [
        step(i, 10 * i, 10 * i + 10, forward_ms=1.0, bytes_needed=10**6, weight_bytes=10**6) for i in range(4)
    ]
    (decode,) = phases(steps, limits)
    assert decode.spent.bound == "host"
    assert decode.spent.host_s == pytest.approx(0.036)


def test_kv_waste_of_an_engine_is_what_its_last_blocks_leave_empty():
    with random_engine(TINY, CPU, max_num_seqs=1, max_model_len=64) as engine:
        steps = run_workload(engine, equal_requests("one", 1, 20, 10, 512)).steps
        num_blocks = engine.stats().num_blocks
    # Each step but the last, whose request gives its blocks back, holds 2 blocks of 16 for 20 to 28 tokens.
    waste = kv_waste(steps, num_blocks=num_blocks, block_size=16)
    assert waste.share == pytest.approx(1 - sum(range(20, 29)) / (9 * 32))
    assert kv_waste(steps, num_blocks=num_blocks, block_size=16, last=2).share == pytest.approx(1 - 28 / 32)


@pytest.mark.parametrize(
    ("bar", "verdicts"),
    [
        (Bar("share", 0.65, 0.85), {0.85: "target", 0.65: "pass", 0.649: "below the bar"}),
        (Bar("ratio", 2.5, 1.5, is_lower_better=True), {1.5: "target", 2.5: "pass", 2.51: "below the bar"}),
    ],
)
def test_bars_judge_in_their_direction(bar, verdicts, capsys):
    assert {value: bar.verdict(value) for value in verdicts} == verdicts
    judged = bar.judge(0.7, is_tiny=True)
    assert judged["verdict"] == "not judged"
    assert bar.what in capsys.readouterr().out


def test_tables_line_up_and_show_what_is_missing(capsys):
    print_table("title", [{"name": "a", "tokens_s": 1234.5}, {"name": "longer", "tokens_s": None}])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert lines == ["title", "  name    tokens s", "  a          1,234", "  longer         –"]


def test_rounds_repeat_lengths_with_other_tokens():
    _, workload = nano_workload(is_tiny=True)
    other, again = workload.with_other_tokens(1), workload.with_other_tokens(1)
    assert other.lengths == workload.lengths
    assert other.prompts == again.prompts
    assert all(a != b for a, b in zip(other.prompts, workload.prompts, strict=True))
