"""The compiled sampler against torch's: the same tokens and figures for every setting, whatever shares the batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from engine.kernels.cpu_library import CpuLibrary
from engine.runner.cpu_sampler import CpuSampler, make_sampler
from engine.runner.sampler import LogitEdits, Masks, SampleSettings, gumbel_noise, noise_keys, sample

CHOICES: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.0},
    {"temperature": 1e-9},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": 10**6},
    {"top_p": 0.9},
    {"top_p": 0.99999},
    {"top_p": 1e-6},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.8, "min_p": 0.02, "temperature": 0.7},
    {"typical_p": 0.3},
    {"typical_p": 0.95, "temperature": 1.5},
    {"typical_p": 1e-6, "top_k": 30},
    {"typical_p": 0.6, "top_p": 0.9, "min_p": 0.001},
)


def settings_of(rows: int, **values: Any) -> SampleSettings:
    def column(name: str, default: float, kind: Any) -> Any:
        return np.broadcast_to(np.asarray(values.get(name, default), dtype=kind), (rows,)).copy()

    return SampleSettings(
        temperature=column("temperature", 1.0, np.float64),
        top_k=column("top_k", 0, np.int64),
        top_p=column("top_p", 1.0, np.float64),
        min_p=column("min_p", 0.0, np.float64),
        typical_p=column("typical_p", 1.0, np.float64),
        seed=column("seed", 0, np.int64),
        position=column("position", 0, np.int64),
        num_logprobs=column("num_logprobs", -1, np.int64),
        edits=values.get("edits", ()),
        masks=values.get("masks"),
    )


def logits_of(rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def edits_of(vocab: int) -> tuple[LogitEdits, ...]:
    """Edits of all kinds, some alone and some together; tokens of the prompt, of the output, of both and of neither."""
    if vocab < 5:
        return ()
    random = np.random.default_rng(vocab)
    bias = random.uniform(-3, 3, vocab).astype(np.float32)
    bias[::3] = -np.inf
    marks = random.choice([0, 0, 1, 2, 3, 9, 200], vocab).astype(np.int16)
    return (
        LogitEdits(1, None, None, banned=(0, 1, vocab - 1)),
        LogitEdits(2, bias, None),
        LogitEdits(4, None, marks, (1.3, 0.0, 0.0)),
        LogitEdits(5, None, marks, (1.0, 0.01, 1.7)),
        LogitEdits(23, bias, marks, (0.7, -0.02, -0.4), (2,)),
    )


def masks_of(vocab: int, *rows: int) -> Masks:
    """Random ones, with words that allow all and words that allow none; the first token may always come."""
    random = np.random.default_rng(vocab)
    bits = random.integers(-(2**31), 2**31, (len(rows), -(-vocab // 32))).astype(np.int32)
    bits[random.random(bits.shape) < 0.3] = -1
    bits[random.random(bits.shape) < 0.3] = 0
    bits[:, 0] |= 1
    return Masks(np.array(rows, np.int64), bits)


@pytest.fixture
def compiled(library: CpuLibrary) -> CpuSampler:
    return CpuSampler(library)


@pytest.mark.parametrize("vocab", [1, 5, 17, 300, 4096, 50_257])
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_same_tokens_and_figures_as_torch(compiled: CpuSampler, vocab: int, choice: dict[str, Any]) -> None:
    rows = 24
    settings = settings_of(
        rows, seed=np.arange(rows) * 2**33 - 7, position=np.arange(rows), num_logprobs=min(4, vocab),
        edits=edits_of(vocab), masks=masks_of(vocab, 0, 3, 4, 20),
        **choice,
    )  # fmt: skip
    logits = logits_of(rows, vocab, seed=vocab)
    before = logits.clone()
    expected, found = sample(logits, settings), compiled(logits, settings)
    assert found.token_ids.tolist() == expected.token_ids.tolist()
    assert torch.equal(logits, before)
    assert found.logprob_rows == expected.logprob_rows == tuple(range(rows))
    assert found.logprobs is not None
    assert expected.logprobs is not None
    for name in ("token_ids", "rank", "top_ids"):
        assert torch.equal(getattr(found.logprobs, name), getattr(expected.logprobs, name)), name
    for name in ("chosen", "top_values"):
        torch.testing.assert_close(
            getattr(found.logprobs, name), getattr(expected.logprobs, name), rtol=1e-5, atol=1e-5
        )


def test_rows_with_settings_of_their_own_do_not_change_each_other(compiled: CpuSampler) -> None:
    """Alone, in a batch, in a batch that threads share, and in another order."""
    rows, vocab = len(CHOICES) * 8, 4096
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}
    columns = {
        name: np.array([(defaults | CHOICES[i % len(CHOICES)])[name] for i in range(rows)])
        for name in defaults
    }
    logits = logits_of(rows, vocab)

    def chosen(order: np.ndarray[Any, Any]) -> list[int]:
        picked = {name: column[order] for name, column in columns.items()}
        return compiled(
            logits[torch.from_numpy(order)], settings_of(len(order), seed=order, position=order * 3, **picked)
        ).token_ids.tolist()

    order = np.arange(rows)
    whole = chosen(order)
    assert chosen(order[::-1].copy()) == whole[::-1]
    assert [chosen(order[i : i + 1])[0] for i in range(rows)] == whole


def test_the_winner_is_the_largest_sum_over_the_whole_row(compiled: CpuSampler) -> None:
    """The bound that spares most of the work never hides the winner: far-apart logits, flat ones, and huge temperatures."""
    rows, vocab = 400, 2048
    for scale in (0.0, 0.01, 1.0, 1e4):
        logits = logits_of(rows, vocab, seed=1) * scale
        seed, position = np.arange(rows), np.arange(rows) % 7
        noise = gumbel_noise(
            noise_keys(seed, position), torch.arange(vocab, dtype=torch.int32), torch.float64
        )
        sums = logits.double() + noise
        best = sums.amax(dim=-1)
        found = compiled(logits, settings_of(rows, seed=seed, position=position)).token_ids
        reached = sums.gather(1, found[:, None])[:, 0]
        assert (best - reached).max() <= 1e-6 * max(1.0, scale), scale


def test_draws_follow_the_softmax(compiled: CpuSampler) -> None:
    draws, vocab = 40_000, 12
    logits = logits_of(1, vocab, seed=3) * 0.3
    found = compiled(
        logits.expand(draws, -1), settings_of(draws, seed=np.arange(draws), position=9)
    ).token_ids
    share = torch.bincount(found, minlength=vocab) / draws
    expected = logits[0].softmax(dim=-1)
    assert ((share - expected).abs() <= 4.5 * (expected * (1 - expected) / draws).sqrt()).all()


def test_equal_logits_greedy_takes_the_lowest_id(compiled: CpuSampler) -> None:
    logits = torch.zeros(3, 100)
    logits[1, 40:60] = 1.0
    logits[2, 99] = 1.0
    assert compiled(logits, settings_of(3, temperature=0.0)).token_ids.tolist() == [0, 40, 99]


def test_only_the_rows_that_ask_get_figures(compiled: CpuSampler) -> None:
    logits = logits_of(4, 64)
    found = compiled(logits, settings_of(4, num_logprobs=[-1, 2, -1, 0], temperature=0.0))
    assert found.logprob_rows == (1, 3)
    assert found.logprobs is not None
    first, second = found.logprobs.entries([2, 0])
    assert first.token_id == int(logits[1].argmax())
    assert len(first.top_ids) == 2
    assert second.top_ids == ()
    assert compiled(logits, settings_of(4)).logprobs is None


def test_float64_goes_to_torch(compiled: CpuSampler) -> None:
    logits = logits_of(8, 300).double()
    settings = settings_of(8, seed=np.arange(8), top_p=0.9)
    assert torch.equal(compiled(logits, settings).token_ids, sample(logits, settings).token_ids)


def test_is_what_a_cpu_runner_samples_with(library: CpuLibrary) -> None:
    assert isinstance(make_sampler(torch.device("cpu"), deterministic=False), CpuSampler)
    assert not isinstance(make_sampler(torch.device("meta"), deterministic=False), CpuSampler)
