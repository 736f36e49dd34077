"""The engine on the GPU: parity with transformers, prefix cache, preemption, mixed batches, no waits, no leaks."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from engine.build import build_engine
from engine.config import EngineConfig
from engine.engine import Engine
from engine.needle import find_needle
from engine.records import StepRecord
from engine.sampling_params import SamplingParams

VOCAB = 512
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 50000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}  # fmt: skip
FAMILIES: dict[str, tuple[type, dict[str, Any]]] = {
    "llama3": (LlamaConfig, {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "mistral": (MistralConfig, {"sliding_window": 100}),
    "qwen2": (Qwen2Config, {"num_attention_heads": 7, "num_key_value_heads": 1}),
    "qwen3": (Qwen3Config, {"head_dim": 80, "tie_word_embeddings": True}),
    # Through transformers' attention interface; three layers of four have the window.
    "cohere2": (Cohere2Config, {"sliding_window": 100, "num_hidden_layers": 4, "logit_scale": 1.0}),
}
# How far a chosen token's log-probability may lie below transformers' best one in float32, in nats: rounding of
# activations to bfloat16 (2^-8 each) over three layers moves logits of a spread of about 4 by some hundredths.
MARGIN = {"float32": 2e-3, "bfloat16": 0.6}


@dataclass
class Ran:
    """What an engine did, by request."""

    tokens: dict[str, list[int]] = field(default_factory=dict)
    logprobs: dict[str, list[float]] = field(default_factory=dict)
    records: list[StepRecord] = field(default_factory=list)

    @property
    def preempted(self) -> set[str]:
        return {name for record in self.records for name in record.preempted}

    @property
    def prefix_hits(self) -> dict[str, int]:
        return {name: hit for record in self.records for name, hit in record.prefix_hits if hit}

    @property
    def mixed_steps(self) -> int:
        return sum(1 for record in self.records if record.num_prefill_tokens and record.num_decode_tokens)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of tiny random models by family; peaked next-token distributions, since flat ones hide errors."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            kind, changes = FAMILIES[family]
            torch.manual_seed(len(family))
            model = AutoModelForCausalLM.from_config(kind(**{**COMMON, **changes})).float()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name.endswith("norm.weight"):
                        parameter.uniform_(0.5, 1.5)
                    elif parameter.ndim == 1:
                        parameter.normal_(0.0, 0.3)
                    elif "embed_tokens" in name or "lm_head" in name:
                        parameter.normal_(0.0, 0.35)
                    else:
                        parameter.normal_(0.0, 1.5 * parameter.shape[1] ** -0.5)
            made[family] = tmp_path_factory.mktemp(family)
            model.to(torch.bfloat16).save_pretrained(made[family])  # both dtypes then mean the same weights
        return made[family]

    return get


@pytest.fixture(autouse=True)
def _clean_device() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()


def make_engine(folder: Path, **settings: Any) -> Engine:
    defaults: dict[str, Any] = {
        "dtype": "float32", "device": "cuda", "num_blocks": 400, "max_num_seqs": 16, "max_model_len": 1024,
        "max_batched_tokens": 256,
    }  # fmt: skip
    return build_engine(EngineConfig(model=str(folder), **{**defaults, **settings}))


def drive(
    engine: Engine,
    prompts: dict[str, list[int]],
    params: SamplingParams,
    arrive_at: dict[str, int] | None = None,
) -> Ran:
    """Run the prompts to their ends; request r is added before step ``arrive_at[r]``."""
    ran, waiting, step, arrive_at = Ran(), dict(prompts), 0, arrive_at or {}
    while waiting or engine.has_work:
        for name in [n for n in waiting if arrive_at.get(n, 0) <= step]:
            engine.add(engine.make_request(tuple(waiting.pop(name)), params, request_id=name))
        output, step = engine.step(), step + 1
        for delta in output.deltas:
            assert delta.error is None, delta.error
            ran.tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
            ran.logprobs.setdefault(delta.request_id, []).extend(entry.logprob for entry in delta.logprobs)
        if output.record is not None:
            assert output.record.error is None, output.record.error
            ran.records.append(output.record)
        assert step < 20000, "the engine makes no progress"
    engine.check_integrity()
    return ran


def run(
    folder: Path,
    prompts: dict[str, list[int]],
    params: SamplingParams,
    arrive_at: dict[str, int] | None = None,
    **settings: Any,
) -> Ran:
    engine = make_engine(folder, **settings)
    try:
        return drive(engine, prompts, params, arrive_at)
    finally:
        engine.close()


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(0, VOCAB, (length,), generator=generator).tolist()


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, logprobs=0)


def assert_likely(reference: PreTrainedModel, prompts: dict[str, list[int]], ran: Ran, margin: float) -> None:
    """Each chosen token is within the margin of transformers' best one, and so is its log-probability."""
    assert ran.tokens.keys() == prompts.keys()
    for name, tokens in ran.tokens.items():
        whole = torch.tensor([[*prompts[name], *tokens]], device=reference.device)
        with torch.no_grad():
            logits = reference(whole).logits[0, len(prompts[name]) - 1 : -1].float()
        expected = logits.log_softmax(-1)
        chosen = expected.gather(1, whole[0, len(prompts[name]) :, None])[:, 0]
        short = (expected.amax(-1) - chosen).max().item()
        assert short <= margin, f"{name}: a chosen token is {short:.4f} nats below the best"
        apart = (chosen - torch.tensor(ran.logprobs[name], device=chosen.device)).abs().max().item()
        assert apart <= margin, f"{name}: a log-probability is off by {apart:.4f}"
        entropy = -(expected.exp() * expected).sum(-1).mean().item()
        assert entropy < 2.0, (
            f"{name}: the distribution is nearly flat ({entropy:.1f} nats) and would hide errors"
        )


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parity_with_transformers(
    family: str, dtype: str, checkpoint: Callable[[str], Path], device: torch.device
) -> None:
    """Contexts of one to 620 tokens: over the window, the rotary threshold, the chunk and the split of the kernels."""
    prompts = {f"r{n}": prompt(n) for n in (1, 15, 16, 17, 130, 300, 590)}
    ran = run(checkpoint(family), prompts, greedy(30), dtype=dtype, arrive_at={"r300": 4, "r590": 9})
    assert ran.mixed_steps > 0
    reference = AutoModelForCausalLM.from_pretrained(
        checkpoint(family), dtype=torch.float32, attn_implementation="eager"
    )
    assert_likely(reference.to(device).eval(), prompts, ran, MARGIN[dtype])


def test_the_triton_backend_is_chosen(checkpoint: Callable[[str], Path]) -> None:
    engine = make_engine(checkpoint("llama3"), dtype="auto", attention_backend="auto")
    try:
        assert engine.config.attention_backend == "triton"
        assert engine.config.dtype == "bfloat16"
        assert engine.config.device.startswith("cuda")
    finally:
        engine.close()


def test_prefix_cache(checkpoint: Callable[[str], Path], device: torch.device) -> None:
    shared = prompt(500)
    prompts = {f"r{i}": [*shared, *prompt(20 + i, seed=i)] for i in range(4)}
    arrive_at = {f"r{i}": 8 * i for i in range(4)}
    ran = run(checkpoint("llama3"), prompts, greedy(12), arrive_at)
    assert {name: ran.prefix_hits.get(name, 0) for name in ("r1", "r2", "r3")} == dict.fromkeys(
        ("r1", "r2", "r3"), 496
    )
    without = run(checkpoint("llama3"), prompts, greedy(12), arrive_at, enable_prefix_cache=False)
    assert not without.prefix_hits
    reference = (
        AutoModelForCausalLM.from_pretrained(checkpoint("llama3"), dtype=torch.float32).to(device).eval()
    )
    for each in (ran, without):
        assert_likely(reference, prompts, each, MARGIN["float32"])


def test_preemption(checkpoint: Callable[[str], Path], device: torch.device) -> None:
    prompts = {f"r{i}": prompt(60 + i, seed=i) for i in range(4)}
    ran = run(
        checkpoint("qwen3"), prompts, greedy(60), num_blocks=20, max_model_len=200, enable_prefix_cache=False
    )
    assert ran.preempted, "the pool was large enough: nothing was preempted"
    reference = (
        AutoModelForCausalLM.from_pretrained(checkpoint("qwen3"), dtype=torch.float32).to(device).eval()
    )
    assert_likely(reference, prompts, ran, MARGIN["float32"])


@pytest.mark.parametrize("enforce_eager", [False, True], ids=["captured", "eager"])
def test_blocks_that_return_from_host_memory_have_every_bit(
    checkpoint: Callable[[str], Path], enforce_eager: bool
) -> None:
    """Four requests in turn, three of them twice, in a pool for little more than two of them at once."""
    first = {f"r{i}": prompt(300 + 40 * i, i) for i in range(3)}
    prompts = first | {f"{name} again": tokens for name, tokens in first.items()} | {"late": prompt(200, 9)}
    arrive_at = {name: 8 * i for i, name in enumerate(prompts)}
    params = greedy(24).with_(logprobs=0)
    tight: dict[str, Any] = {
        "num_blocks": 50,
        "max_model_len": 512,
        "deterministic": True,
        "enforce_eager": enforce_eager,
    }
    runs = []
    for settings in (tight | {"swap_space_bytes": 1 << 24}, tight | {"num_blocks": 400}):
        engine = make_engine(checkpoint("qwen3"), **settings)
        runs.append(drive(engine, prompts, params, arrive_at))
        engine.close()
    tier, roomy = runs
    assert sum(record.num_blocks_back for record in tier.records) > 0
    assert any(record.num_blocks_out and record.graph_size for record in tier.records) != enforce_eager
    assert tier.tokens == roomy.tokens
    assert tier.logprobs == roomy.logprobs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deterministic_mode_gives_the_same_bits_alone_batched_and_in_other_chunks(
    dtype: str, checkpoint: Callable[[str], Path]
) -> None:
    prompts = {f"r{n}": prompt(n) for n in (5, 64, 300, 560)}
    settings: dict[str, Any] = {"dtype": dtype, "deterministic": True, "enable_prefix_cache": False}
    together = run(
        checkpoint("qwen3"), prompts, greedy(12), {"r5": 3, "r64": 6}, max_batched_tokens=100, **settings
    )
    assert together.mixed_steps > 0
    for name in prompts:
        alone = run(
            checkpoint("qwen3"), {name: prompts[name]}, greedy(12), max_batched_tokens=1024, **settings
        )
        assert alone.tokens[name] == together.tokens[name], name
        assert alone.logprobs[name] == together.logprobs[name], f"{name}: same tokens, other bits"


@pytest.mark.parametrize("deterministic", [True, False])
def test_the_needle_is_found_in_deterministic_mode_alone(
    deterministic: bool, checkpoint: Callable[[str], Path]
) -> None:
    """With the mode off libraries choose their kernels by the batch: a needle test that held there would prove nothing."""
    engine = make_engine(checkpoint("llama3"), dtype="bfloat16", deterministic=deterministic)
    try:
        assert engine.stats().is_proven_deterministic is (True if deterministic else None)
        proof = find_needle(engine, VOCAB)
        assert proof.holds == deterministic, proof.difference
    finally:
        engine.close()


@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "fast"])
def test_graphs_overlap_and_cache_do_not_change_the_answers(
    deterministic: bool, checkpoint: Callable[[str], Path], device: torch.device
) -> None:
    """To the bit in deterministic mode; else each token is within the margin of the best one."""
    shared = prompt(200)
    prompts = {f"r{i}": [*shared, *prompt(9 + 31 * i, seed=i)] for i in range(5)}
    prompts |= {f"s{i}": prompt(520 + i, seed=20 + i) for i in range(2)}  # their attention is split
    arrive_at = {"r2": 4, "r3": 9, "r4": 9, "s1": 6}
    ran: dict[str, Ran] = {}
    for name, settings in {
        "all on": {},
        "no graphs": {"enforce_eager": True},
        "no overlap": {"async_scheduling": False},
        "no cache": {"enable_prefix_cache": False},
    }.items():
        values = {"dtype": "bfloat16", "deterministic": deterministic, **settings}
        ran[name] = run(checkpoint("qwen3"), prompts, greedy(40), arrive_at, **values)
    sizes = {
        name: {record.graph_size for record in each.records if record.rows} for name, each in ran.items()
    }
    assert sizes["no graphs"] == {0}
    assert {2, 4, 8} <= sizes["all on"], sizes
    if deterministic:
        for name, each in ran.items():
            assert each.tokens == ran["all on"].tokens, name
            assert each.logprobs == ran["all on"].logprobs, f"{name}: same tokens, other bits"
    else:
        reference = AutoModelForCausalLM.from_pretrained(checkpoint("qwen3"), dtype=torch.float32)
        for each in ran.values():
            assert_likely(reference.to(device).eval(), prompts, each, MARGIN["bfloat16"])


@pytest.mark.parametrize("stored", ["int8", "fp8"])
def test_a_quantized_cache_gives_the_same_bits_captured_and_cached_or_not(
    stored: str, checkpoint: Callable[[str], Path]
) -> None:
    shared = prompt(200)
    prompts = {f"r{i}": [*shared, *prompt(9 + 31 * i, seed=i)] for i in range(4)} | {"split": prompt(520)}
    settings = {"dtype": "bfloat16", "deterministic": True, "kv_cache_dtype": stored}
    found, eager = (
        run(checkpoint("qwen3"), prompts, greedy(40), {"r2": 4, "r3": 9}, **settings, **more)
        for more in ({}, {"enforce_eager": True, "enable_prefix_cache": False})
    )
    assert {2, 4} <= {record.graph_size for record in found.records if record.rows}
    assert found.prefix_hits
    assert found.tokens == eager.tokens
    assert found.logprobs == eager.logprobs, "same tokens, other bits"
    plain = run(checkpoint("qwen3"), prompts, greedy(40), dtype="bfloat16", deterministic=True)
    assert found.logprobs != plain.logprobs, "the cache was not quantized"


def test_sampling_with_a_seed_repeats(checkpoint: Callable[[str], Path]) -> None:
    prompts = {f"r{i}": prompt(40, seed=i) for i in range(6)}
    params = SamplingParams(
        max_tokens=25, temperature=0.9, top_k=50, top_p=0.95, seed=7, ignore_eos=True, logprobs=3
    )
    first, second = (run(checkpoint("llama3"), prompts, params) for _ in range(2))
    assert first.tokens == second.tokens
    assert len({tuple(tokens) for tokens in first.tokens.values()}) == len(prompts)


def test_controls_hold_in_captured_steps_and_in_others(checkpoint: Callable[[str], Path]) -> None:
    prompts = {f"r{i}": prompt(40, seed=i) for i in range(6)}
    params = SamplingParams(
        max_tokens=25, temperature=0.9, seed=7, ignore_eos=True, presence_penalty=0.5, repetition_penalty=1.2,
        logit_bias={6: 3.0}, bad_words=((8,), (6, 6)), allowed_token_ids=tuple(range(0, 90, 2)),
    )  # fmt: skip
    captured, eager = (
        run(checkpoint("llama3"), prompts, params, deterministic=True, enforce_eager=off)
        for off in (False, True)
    )
    assert captured.tokens == eager.tokens
    assert max(record.graph_size for record in captured.records) == 8
    for tokens in captured.tokens.values():
        assert all(token % 2 == 0 and token != 8 for token in tokens)
        assert (6, 6) not in itertools.pairwise(tokens)


def test_two_steps_overlap_and_nothing_waits_for_the_device(checkpoint: Callable[[str], Path]) -> None:
    """torch raises on a call that waits, which would end the requests with an error; collecting waits for an event."""
    engine = make_engine(checkpoint("llama3"), dtype="bfloat16")
    params = SamplingParams(
        max_tokens=20, temperature=0.8, top_p=0.9, min_p=0.01, seed=1, ignore_eos=True, logprobs=2
    )
    try:
        assert engine._runner.max_inflight == 2
        prompts = {f"r{i}": prompt(30 + 40 * i, seed=i) for i in range(5)}
        drive(
            engine, {f"warm {name}": tokens for name, tokens in prompts.items()}, params
        )  # compiles kernels
        torch.cuda.set_sync_debug_mode("error")
        try:
            ran = drive(engine, prompts, params, {"r3": 4, "r4": 7})
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(len(tokens) == 20 for tokens in ran.tokens.values())
        assert all(record.forward_ms > 0 for record in ran.records if record.rows)
    finally:
        engine.close()


def test_close_gives_the_memory_back_and_a_second_engine_takes_no_more(
    checkpoint: Callable[[str], Path], device: torch.device
) -> None:
    def cycle() -> int:
        torch.cuda.reset_peak_memory_stats(device)
        ran = run(checkpoint("mistral"), {"a": prompt(600), "b": prompt(20)}, greedy(20), dtype="bfloat16")
        assert len(ran.tokens["a"]) == 20
        return torch.cuda.max_memory_allocated(device)

    before = torch.cuda.memory_allocated(device)
    first = cycle()
    gc.collect()
    after = torch.cuda.memory_allocated(device)
    assert after <= before, f"{after - before} bytes are still allocated after close"
    second = cycle()
    assert second <= first + (1 << 20), f"the second engine took {second - first} bytes more"
