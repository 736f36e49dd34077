"""The runner executes plans as the contract says: deltas, rows, order of results, figures, errors."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import EngineDeadError, OutOfMemoryError
from engine.plan import StepPlan, StepResult
from engine.runner.host_zeros import host_zeros
from engine.runner.model_runner import ModelRunner

PROMPT = [5, 9, 33, 2, 8, 8, 14, 21, 3, 40, 17]
Oracle = Callable[[Any], torch.Tensor]
Make = Callable[..., ModelRunner]


def step(runner: ModelRunner, plan: StepPlan) -> StepResult:
    runner.submit(plan)
    return runner.collect()


def greedy(oracle: Oracle, tokens: list[int], count: int) -> list[int]:
    text = list(tokens)
    for _ in range(count):
        text.append(int(oracle(text)[-1].argmax()))
    return text[len(tokens) :]


def test_a_row_goes_through_chunks_new_blocks_and_decode(
    make_runner: Make, plans: Any, oracle: Oracle
) -> None:
    runner, expected = make_runner(), greedy(oracle, PROMPT, 4)
    first = step(runner, plans.plan_of(0, [(2, 0, 6)], admitted=[plans.admit(2, PROMPT, [7, 3])]))
    assert first.token_ids == []
    second = step(runner, plans.plan_of(1, [(2, 6, 5)], samples=[0], new_blocks={0: [20]}))
    found = second.token_ids + step(runner, plans.plan_of(2, [(2, 11, 1)], samples=[0])).token_ids
    found += step(runner, plans.plan_of(3, [(2, 12, 1)], samples=[0], new_blocks={0: [0]})).token_ids
    found += step(runner, plans.plan_of(4, [(2, 13, 1)], samples=[0])).token_ids
    assert found == expected


def test_rows_of_a_mixed_step_answer_in_the_plans_order(
    make_runner: Make, plans: Any, oracle: Oracle
) -> None:
    runner, texts = make_runner(), {0: PROMPT, 3: PROMPT[::-1], 1: PROMPT[2:9]}
    begin = plans.plan_of(
        0, [(3, 0, 11), (0, 0, 11)], samples=[0, 1],
        admitted=[plans.admit(0, texts[0], [1, 2, 3]), plans.admit(3, texts[3], [9, 8, 4])],
    )  # fmt: skip
    assert step(runner, begin).token_ids == [greedy(oracle, texts[3], 1)[0], greedy(oracle, texts[0], 1)[0]]
    mixed = plans.plan_of(
        1,
        [(0, 11, 1), (3, 11, 1), (1, 0, 7)],
        samples=[0, 1, 2],
        admitted=[plans.admit(1, texts[1], [12, 13])],
    )
    expected = [
        greedy(oracle, texts[0], 2)[1],
        greedy(oracle, texts[3], 2)[1],
        greedy(oracle, texts[1], 1)[0],
    ]
    result = step(runner, mixed)
    assert result.token_ids == expected
    assert result.step_id == 1
    # Only the middle row samples: its token, and nothing of the others.
    assert step(runner, plans.plan_of(2, [(0, 12, 1), (3, 12, 1)], samples=[1])).token_ids == [
        greedy(oracle, texts[3], 3)[2]
    ]


def test_a_row_given_back_and_taken_again_keeps_nothing(
    make_runner: Make, plans: Any, oracle: Oracle
) -> None:
    runner = make_runner()
    hot = plans.admit(
        1, PROMPT, [1, 2, 3], temperature=5.0, row_seed=9, logprobs=3, prompt_logprobs=3, min_tokens=9
    )
    step(runner, plans.plan_of(0, [(1, 0, 11)], samples=[0], admitted=[hot]))
    other = PROMPT[::-1][:6]
    again = plans.plan_of(1, [(1, 0, 6)], samples=[0], finished=[1], admitted=[plans.admit(1, other, [3, 1])])
    result = step(runner, again)
    assert result.token_ids == greedy(oracle, other, 1)
    assert result.logprobs == {}
    assert result.prompt_logprobs == {}


def test_preempted_rows_bring_their_outputs_back(make_runner: Make, plans: Any, oracle: Oracle) -> None:
    expected = greedy(oracle, PROMPT, 3)
    runner = make_runner()
    back = plans.admit(0, PROMPT + expected[:2], [5, 6, 7, 8], num_prompt=len(PROMPT))
    assert (
        step(runner, plans.plan_of(0, [(0, 0, 13)], samples=[0], admitted=[back])).token_ids == expected[2:]
    )


def test_figures_are_given_to_the_rows_that_asked(make_runner: Make, plans: Any, oracle: Oracle) -> None:
    runner = make_runner()
    expected = oracle(PROMPT).log_softmax(-1)
    admitted = [
        plans.admit(0, PROMPT, [1, 2, 3]),
        plans.admit(1, PROMPT, [4, 5, 6], logprobs=2),
        plans.admit(2, PROMPT, [7, 8, 9], logprobs=1, prompt_logprobs=1),
    ]
    plan = plans.plan_of(0, [(0, 0, 11), (1, 0, 11), (2, 0, 7)], samples=[0, 1], admitted=admitted)
    result = step(runner, plan)
    assert set(result.logprobs) == {1}
    assert result.logprobs[1].logprob == pytest.approx(float(expected[-1].max()))
    assert result.logprobs[1].rank == 1
    assert list(result.logprobs[1].top_ids) == expected[-1].topk(2).indices.tolist()
    rest = step(runner, plans.plan_of(1, [(2, 7, 4)], samples=[0]))
    entries = result.prompt_logprobs[2] + rest.prompt_logprobs[0]
    assert [e.token_id for e in entries] == PROMPT[1:]
    assert [e.logprob for e in entries] == pytest.approx(
        [float(expected[i, t]) for i, t in enumerate(PROMPT[1:])]
    )
    assert [e.top_ids for e in entries] == [(int(row.argmax()),) for row in expected[:-1]]


def test_no_stop_token_before_min_tokens(make_runner: Make, plans: Any, oracle: Oracle) -> None:
    stop = greedy(oracle, PROMPT, 1)[0]
    for params, may_stop in (
        ({"stop_token_ids": (stop,)}, True),
        ({"stop_token_ids": (stop,), "min_tokens": 1}, False),
        ({"min_tokens": 1}, True),  # the end-of-sequence id is another one
    ):
        plan = plans.plan_of(
            0, [(0, 0, 11)], samples=[0], admitted=[plans.admit(0, PROMPT, [1, 2, 3], **params)]
        )
        assert (step(make_runner(), plan).token_ids == [stop]) == may_stop, params


def test_each_step_states_times_and_what_it_needed(make_runner: Make, plans: Any) -> None:
    result = step(
        make_runner(),
        plans.plan_of(0, [(0, 0, 11)], samples=[0], admitted=[plans.admit(0, PROMPT, [1, 2, 3])]),
    )
    assert result.prepare_ms > 0
    assert result.forward_ms > 0
    assert result.sample_ms > 0
    assert 0 < result.weight_bytes < result.bytes_needed
    assert 0 < result.attention_flops < result.flops_needed


class Failing:
    """A decoder whose next forward raises."""

    def __init__(self, decoder: Any) -> None:
        self.config, self._decoder = decoder.config, decoder
        self.error: BaseException | None = None

    def forward(self, *args: Any) -> Any:
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return self._decoder.forward(*args)

    def logits(self, hidden: Any) -> Any:
        return self._decoder.logits(hidden)

    def step_weights(self) -> Any:
        return self._decoder.step_weights()


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (ValueError("odd"), ValueError),
        (torch.OutOfMemoryError("2 GiB"), OutOfMemoryError),
        (torch.AcceleratorError("device-side assert"), EngineDeadError),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), EngineDeadError),
    ],
)
def test_a_failing_step_raises_in_collect_and_the_next_one_runs(
    make_runner: Make,
    plans: Any,
    oracle: Oracle,
    tiny_decoder: Any,
    raised: BaseException,
    expected: type[BaseException],
) -> None:
    decoder = Failing(tiny_decoder())
    runner = make_runner(decoder)
    decoder.error = raised
    runner.submit(plans.plan_of(0, [(0, 0, 11)], samples=[0], admitted=[plans.admit(0, PROMPT, [1, 2, 3])]))
    with pytest.raises(expected):
        runner.collect()
    runner.reset_rows()
    again = plans.plan_of(1, [(0, 0, 11)], samples=[0], admitted=[plans.admit(0, PROMPT, [1, 2, 3])])
    assert step(runner, again).token_ids == greedy(oracle, PROMPT, 1)


def test_a_closed_runner_refuses(make_runner: Make, plans: Any) -> None:
    runner = make_runner()
    runner.close()
    runner.close()
    with pytest.raises(EngineDeadError):
        runner.submit(plans.plan_of(0, [(0, 0, 1)], admitted=[plans.admit(0, [1], [1])]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_host_zeros_are_zeros_and_take_no_memory_until_they_are_written(dtype: torch.dtype) -> None:
    def resident() -> int:
        found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        return 1024 * int(found[1])

    shape, size = (64, 1 << 20), (64 << 20) * dtype.itemsize
    before = resident()
    zeros = host_zeros(shape, dtype)
    assert resident() - before < size // 8
    assert (zeros.shape, zeros.dtype, zeros.untyped_storage().nbytes()) == (shape, dtype, size)
    assert zeros.data_ptr() % 64 == 0, "vectors of the kernels would lie across two lines of the cache"
    assert not zeros.view(torch.uint8).any()
    zeros.view(torch.uint8).fill_(1)
    assert resident() - before > size - size // 8
    del zeros
    assert resident() - before < size // 8
