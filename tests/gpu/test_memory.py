"""The ledger of an engine on the GPU against torch's allocator, and a pool sized by its profile run."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine.build import build_engine
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import OutOfMemoryError
from engine.sampling_params import MAX_LOGPROBS, SamplingParams

VOCAB = 32000
MAX_NUM_SEQS, MAX_BATCHED_TOKENS, MAX_MODEL_LEN = 128, 4096, 2048


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=MAX_MODEL_LEN, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    found = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(found)
    return found


def make_engine(folder: Path, **settings: int) -> Engine:
    gc.collect()
    torch.cuda.empty_cache()
    config = EngineConfig(
        model=str(folder), device="cuda", dtype="bfloat16", max_num_seqs=MAX_NUM_SEQS,
        max_batched_tokens=MAX_BATCHED_TOKENS, max_model_len=MAX_MODEL_LEN, enable_prefix_cache=False, **settings,
    )  # fmt: skip
    return build_engine(config)


def run_full_batch(engine: Engine) -> None:
    """Every row at work with every filter, prompts that fill whole steps, log-probabilities of some."""
    generator = torch.Generator().manual_seed(1)
    for i in range(MAX_NUM_SEQS + 8):
        prompt = torch.randint(0, VOCAB, (400 + 12 * i,), generator=generator).tolist()
        params = SamplingParams(
            max_tokens=24, min_tokens=8, stop_token_ids=(0,), top_k=VOCAB - 1, top_p=0.99, min_p=1e-6, seed=i,
            logprobs=MAX_LOGPROBS, prompt_logprobs=None if i % 16 else MAX_LOGPROBS,
        )  # fmt: skip
        engine.add(engine.make_request(prompt, params))
    while engine.has_work:
        for delta in engine.step().deltas:
            assert delta.error is None, delta.error


def test_the_ledger_is_what_the_allocator_holds_at_its_peak(folder: Path, device: torch.device) -> None:
    """Within 1 %: what differs is rounding to segments, and steps that are a little smaller than the largest."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device)
    engine = make_engine(folder, kv_memory_bytes=8 << 30)
    try:
        ledger = engine.stats().memory
        assert ledger is not None
        torch.cuda.reset_peak_memory_stats(device)
        run_full_batch(engine)
        held = torch.cuda.max_memory_reserved(device) - before
        assert held == pytest.approx(ledger.engine_bytes, rel=0.01)
        assert ledger.total_bytes == torch.cuda.mem_get_info(device)[1]
        assert ledger.engine_bytes + ledger.other_bytes + ledger.free_bytes == ledger.total_bytes
    finally:
        engine.close()


def test_weights_and_cache_are_what_the_allocator_gave(folder: Path, device: torch.device) -> None:
    gc.collect()
    before = torch.cuda.memory_allocated(device)
    engine = make_engine(folder, kv_memory_bytes=1 << 30)
    try:
        ledger = engine.stats().memory
        assert ledger is not None
        allocated = torch.cuda.memory_allocated(device) - before
        assert ledger.weights_bytes + ledger.kv_bytes == pytest.approx(allocated, rel=0.01)
    finally:
        engine.close()


def test_a_pool_of_all_that_is_free_is_refused_with_advice(folder: Path, device: torch.device) -> None:
    free, _ = torch.cuda.mem_get_info(device)
    with pytest.raises(OutOfMemoryError, match=r"weights .*workspace .*kv_memory_bytes="):
        make_engine(folder, kv_memory_bytes=free)


@pytest.mark.parametrize("level", [1, 2])
def test_asleep_it_gives_weights_and_cache_back_and_wakes_to_the_same_tokens(
    folder: Path, device: torch.device, level: int
) -> None:
    gc.collect()
    before = torch.cuda.memory_allocated(device)
    engine = make_engine(folder, kv_memory_bytes=1 << 30)

    def answer() -> list[int]:
        engine.add(engine.make_request([7, 30, 4, 99] * 20, SamplingParams(max_tokens=32, temperature=0.0)))
        tokens: list[int] = []
        while engine.has_work:
            tokens += [token for delta in engine.step().deltas for token in delta.token_ids]
        return tokens

    try:
        expected, ledger = answer(), engine.stats().memory
        assert ledger is not None
        awake = torch.cuda.memory_allocated(device)
        for _ in range(2):
            engine.sleep(level)
            given_back = awake - torch.cuda.memory_allocated(device)
            assert given_back >= 0.99 * (ledger.weights_bytes + ledger.kv_bytes)  # less what rounding adds
            engine.wake_up()
            assert torch.cuda.memory_allocated(device) <= 1.01 * awake
            assert answer() == expected
    finally:
        engine.close()
    gc.collect()
    assert torch.cuda.memory_allocated(device) <= before
