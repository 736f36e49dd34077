"""Faults of a model and its device, in an engine over a real runner: numbers that are none, and memory that runs out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from engine import Engine, EngineConfig, FinishReason, SamplingParams
from engine.attention.reference import ReferenceAttention
from engine.memory import make_kv_spec
from engine.models.decoder import Decoder
from engine.runner.model_runner import ModelRunner
from tests.engine.runner.conftest import BLOCK_SIZE, END, MODEL, random_decoder

BAD = 42  # the token whose embedding is garbage
PROMPTS = {"a": [1, 2, 3, 4, 5], "bad": [7, BAD, *range(20, 34)], "c": [9, 8, 7]}


class OutOfMemory(Decoder):
    """Asks for more memory than there is, while told to."""

    fails = False

    def forward(self, token_ids: Tensor, *inputs: Any) -> Tensor:
        if self.fails:
            raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB")
        return super().forward(token_ids, *inputs)


def engine_on(decoder: Decoder) -> Engine:
    """An engine whose prompts are computed in pieces of two blocks."""
    config = EngineConfig(
        model="tiny", dtype="float32", device="cpu", num_blocks=24, block_size=BLOCK_SIZE, max_num_seqs=4, max_model_len=40,
        max_batched_tokens=16, attention_backend="reference", num_threads=1, kv_cache_dtype="float32",
    )  # fmt: skip
    kv_spec = make_kv_spec(MODEL, BLOCK_SIZE, torch.float32)
    runner = ModelRunner(
        decoder, ReferenceAttention(), config=config, kv_spec=kv_spec, eos_token_ids=frozenset({END}),
        device=torch.device("cpu"), dtype=torch.float32,
    )  # fmt: skip
    return Engine(
        config, runner, kv_spec=kv_spec, eos_token_ids=frozenset({END}), vocab_size=MODEL.vocab_size
    )


def run(engine: Engine, prompts: dict[str, list[int]], **params: Any) -> dict[str, tuple[list[int], Any]]:
    """Tokens and last delta of each request."""
    for name, prompt in prompts.items():
        asked = SamplingParams(max_tokens=6, ignore_eos=True, **params)
        engine.add(engine.make_request(prompt, asked, request_id=name))
    tokens: dict[str, list[int]] = {name: [] for name in prompts}
    last: dict[str, Any] = {}
    while engine.has_work:
        for delta in engine.step().deltas:
            tokens[delta.request_id] += delta.token_ids
            last[delta.request_id] = delta
        engine.check_integrity()
    return {name: (tokens[name], last[name]) for name in prompts}


@pytest.mark.parametrize(
    "params",
    [
        pytest.param({"temperature": 0.0, "logprobs": 3}, id="greedy, with figures"),
        pytest.param(
            {"temperature": 0.9, "seed": 1, "top_k": 9, "top_p": 0.9, "typical_p": 0.9}, id="filtered"
        ),
    ],
)
def test_logits_that_are_no_numbers_end_their_request_alone(fault: Any, params: dict[str, Any]) -> None:
    decoder = random_decoder(torch.float32)
    expected = run(engine_on(decoder), PROMPTS, **params)
    assert not any(BAD in tokens for tokens, _ in expected.values())
    engine = engine_on(decoder)
    embedding = decoder.embedding[BAD].clone()
    decoder.embedding[BAD] = float("nan")
    found = run(engine, PROMPTS, **params)
    tokens, last = found["bad"]
    assert (tokens, last.finish_reason) == ([], FinishReason.ERROR)
    others = [name for name in PROMPTS if name != "bad"]
    assert all(found[name][0] == expected[name][0] for name in others)
    decoder.embedding[BAD] = embedding
    again = run(engine, PROMPTS, **params)
    assert {name: each[0] for name, each in again.items()} == {
        name: each[0] for name, each in expected.items()
    }
    assert engine.stats().step_errors == 0
    fault(
        "logits of one row are NaN or infinite", fails=f"that request alone, with finish reason `{last.finish_reason.value}`: {last.error}",
        goes_on="all others, with the tokens that they would have had; the KV blocks that the failed request had computed are not "
        "matched by later prompts", afterwards="the same prompt succeeds once the model computes numbers again (on a CPU; a GPU's "
        "sampler takes NaN for the least likely)",
    )  # fmt: skip


def test_memory_that_runs_out_in_a_step_fails_that_step(fault: Any) -> None:
    decoder = random_decoder(torch.float32)
    decoder.__class__ = OutOfMemory
    engine = engine_on(decoder)
    expected = run(engine, PROMPTS, temperature=0.0)
    decoder.fails = True
    failed = run(engine, PROMPTS, temperature=0.0)
    assert {last.finish_reason for _, last in failed.values()} == {FinishReason.ERROR}
    error = failed["a"][1].error
    assert "OutOfMemoryError" in error
    assert "Lower max_batched_tokens" in error
    decoder.fails = False
    assert {name: each[0] for name, each in run(engine, PROMPTS, temperature=0.0).items()} == {
        name: each[0] for name, each in expected.items()
    }
    fault(
        "out of memory in a step", fails=f"the requests of that step, with finish reason `{failed['a'][1].finish_reason.value}` and what to "
        "lower", goes_on="all others; the next request succeeds, the blocks are free", afterwards="the same engine",
    )  # fmt: skip
