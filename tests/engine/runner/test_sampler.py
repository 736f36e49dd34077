"""The sampler draws from the right distribution, from the right set, repeatably, and reports true log-probabilities."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor, TypicalLogitsWarper

from engine.kernels.gumbel import mix32
from engine.kernels.penalties import FULL, IN_PROMPT
from engine.runner import sampler
from engine.runner.controls import Controls
from engine.runner.sampler import (
    Filters,
    LogitEdits,
    SampleSettings,
    gumbel_noise,
    keep_likely,
    noise_keys,
    sample,
)

M32 = 0xFFFFFFFF


def py_mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D & M32
    x ^= x >> 15
    x = x * 0x846CA68B & M32
    return x ^ x >> 16


def py_hash(seed: int, position: int, token: int) -> int:
    """The hash as the sampler's docstring states it, in Python's integers."""
    low, high = seed & M32, seed >> 32 & M32
    mixed = py_mix(low + 0x9E3779B9 & M32)
    key0 = py_mix(mixed ^ position)
    key1 = py_mix(py_mix(high ^ mixed) ^ py_mix(position + 0x85EBCA6B & M32))
    return py_mix(py_mix(token ^ key0) + key1 & M32)


def py_gumbel(seed: int, position: int, token: int) -> float:
    u = min((py_hash(seed, position, token) + 0.5) / 2**32, 1 - 2**-24)
    return -math.log(-math.log1p(-u))


def settings_of(rows: int, **values: Any) -> SampleSettings:
    """Settings of `rows` rows; a scalar counts for all."""
    defaults: dict[str, Any] = {
        "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "seed": 0, "position": 0, "num_logprobs": -1,
    }  # fmt: skip
    edits = values.pop("edits", ())
    floats = {"temperature", "top_p", "min_p", "typical_p"}
    arrays = {
        name: np.broadcast_to(
            np.asarray(values.get(name, default), dtype=np.float64 if name in floats else np.int64), (rows,)
        ).copy()
        for name, default in defaults.items()
    }
    return SampleSettings(**arrays, edits=edits)


def random_logits(rows: int, vocab: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_mixer_equals_the_integer_reference() -> None:
    values = [0, 1, 2, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x12345678, 0xDEADBEEF]
    found = mix32(torch.tensor(values).to(torch.int32))
    assert [v & M32 for v in found.tolist()] == [py_mix(v) for v in values]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, 2**40 + 7, 2**63 - 1, -(2**63)])
def test_noise_equals_the_integer_reference(seed: int) -> None:
    tokens, positions = [0, 1, 511, 151_935], [0, 1, 4095, 131_071]
    keys = noise_keys(np.full(4, seed, dtype=np.int64), np.array(positions))
    found = gumbel_noise(keys, torch.tensor(tokens, dtype=torch.int32), torch.float64)
    for i, position in enumerate(positions):
        for j, token in enumerate(tokens):
            assert float(found[i, j]) == pytest.approx(py_gumbel(seed, position, token), rel=1e-12)


def test_noise_is_gumbel_distributed_over_tokens_positions_and_seeds() -> None:
    count = 4096
    ids, some = torch.arange(count, dtype=torch.int32), np.arange(count)
    zeros = np.zeros(count, dtype=np.int64)
    samples = {
        "tokens": gumbel_noise(noise_keys(zeros[:1], zeros[:1]), ids, torch.float64).flatten(),
        "positions": gumbel_noise(noise_keys(zeros, some), ids[:1], torch.float64).flatten(),
        "seeds": gumbel_noise(noise_keys(some, zeros), ids[:1], torch.float64).flatten(),
        "high half of seeds": gumbel_noise(noise_keys(some << 32, zeros), ids[:1], torch.float64).flatten(),
    }
    for name, noise in samples.items():
        uniform = (-(-noise).exp()).exp().sort().values
        steps = torch.arange(1, count + 1, dtype=torch.float64) / count
        distance = (
            (uniform - steps).abs().max()
        )  # Kolmogorov-Smirnov; 1.95 / sqrt(n) is passed with p = 0.001
        assert distance < 1.95 / count**0.5, name


def test_noise_is_the_same_wherever_a_token_stands() -> None:
    keys = noise_keys(np.array([5, 5, 9]), np.array([3, 3, 4]))
    whole = gumbel_noise(keys, torch.arange(1000, dtype=torch.int32), torch.float32, invariant=True)
    some = torch.tensor([7, 999, 31, 500, 1], dtype=torch.int32)
    assert torch.equal(whole[0], whole[1])
    assert torch.equal(
        gumbel_noise(keys[:, 2:], some, torch.float32, invariant=True)[0], whole[2][some.long()]
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_draws_follow_the_softmax(temperature: float) -> None:
    vocab, draws = 12, 20_000
    logits = random_logits(1, vocab, seed=3) * 0.3
    chosen = sample(
        logits.expand(draws, -1),
        settings_of(draws, temperature=temperature, seed=np.arange(draws), position=9),
    )
    counts = torch.bincount(chosen.token_ids, minlength=vocab).double()
    expected = (logits[0].double() / temperature).softmax(-1) * draws
    assert expected.min() > 5
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert statistic < 31.26, "chi-square with 11 degrees of freedom, p = 0.001"


@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": 4},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"top_k": 5, "top_p": 0.8, "min_p": 0.05},
        {"typical_p": 0.6},
    ],
)
def test_filtered_draws_follow_the_renormalised_softmax(filters: dict[str, float]) -> None:
    vocab, draws = 16, 10_000
    logits = random_logits(1, vocab, seed=1) * 0.5
    kept = sorted(brute_force_kept(logits[0].tolist(), **filters))
    chosen = sample(
        logits.expand(draws, -1), settings_of(draws, seed=np.arange(draws) * 7, position=1, **filters)
    ).token_ids
    assert set(chosen.tolist()) == set(kept)
    counts = torch.bincount(chosen, minlength=vocab).double()[kept]
    expected = logits[0, kept].double().softmax(-1) * draws
    statistic = float(((counts - expected) ** 2 / expected).sum())
    degrees = len(kept) - 1
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5 + 4


def brute_force_kept(
    logits: list[float], top_k: float = 0, top_p: float = 1.0, min_p: float = 0.0, typical_p: float = 1.0
) -> set[int]:
    """The filters one after the other on plain lists."""
    kept = list(range(len(logits)))

    def probabilities() -> dict[int, float]:
        total = sum(math.exp(logits[i]) for i in kept)
        return {i: math.exp(logits[i]) / total for i in kept}

    p = probabilities()
    kept = [i for i in kept if p[i] >= min_p * max(p.values())]
    if top_k:
        kth = sorted((logits[i] for i in kept), reverse=True)[min(int(top_k), len(kept)) - 1]
        kept = [i for i in kept if logits[i] >= kth]
    if top_p < 1.0:
        p, total, chosen = probabilities(), 0.0, []
        for i in sorted(kept, key=lambda i: (-p[i], i)):
            if total >= top_p:
                break
            chosen.append(i)
            total += p[i]
        kept = chosen
    if typical_p < 1.0:
        p, total = probabilities(), 0.0
        entropy = -sum(p[i] * math.log(p[i]) for i in kept)
        chosen = []
        for i in sorted(kept, key=lambda i: abs(-math.log(p[i]) - entropy)):
            if total >= typical_p:
                break
            chosen.append(i)
            total += p[i]
        kept = chosen
    return set(kept)


def test_filters_equal_brute_force_on_a_mixed_batch() -> None:
    generator = np.random.default_rng(0)
    rows, vocab = 200, 40
    logits = random_logits(rows, vocab, seed=8, dtype=torch.float64)
    logits[::7] = logits[::7].round()  # ties
    top_k = generator.choice([0, 1, 3, 17, 39, 40, 500], rows)
    top_p = generator.choice([1.0, 0.05, 0.5, 0.9, 0.999], rows)
    min_p = generator.choice([0.0, 0.02, 0.3, 1.0], rows)
    found = keep_likely(logits, Filters(top_k, top_p, min_p, np.ones(rows)))
    for i in range(rows):
        kept = set(torch.nonzero(found[i] > float("-inf")).flatten().tolist())
        assert kept == brute_force_kept(logits[i].tolist(), top_k[i], top_p[i], min_p[i]), (
            top_k[i],
            top_p[i],
            min_p[i],
        )
        assert all(found[i, j] == logits[i, j] for j in kept)


@pytest.mark.parametrize("before", [{}, {"top_k": 17}, {"top_p": 0.9}, {"min_p": 0.05, "top_k": 30}], ids=str)
@pytest.mark.parametrize("mass", [0.01, 0.3, 0.9])
def test_typical_tokens_are_those_of_transformers(mass: float, before: dict[str, float]) -> None:
    """In float64, behind the other filters; rows that do not ask for it are left alone."""
    rows, vocab = 40, 200
    logits = random_logits(rows, vocab, seed=4, dtype=torch.float64)
    logits[::5] = logits[::5].round()  # ties
    top_k, top_p, min_p = (
        np.full(rows, before.get(name, default), kind)
        for name, default, kind in (
            ("top_k", 0, np.int64),
            ("top_p", 1.0, np.float64),
            ("min_p", 0.0, np.float64),
        )
    )
    left = keep_likely(logits, Filters(top_k, top_p, min_p, np.ones(rows)))
    typical_p = np.where(np.arange(rows) % 4 == 3, 1.0, mass)
    found = keep_likely(logits, Filters(top_k, top_p, min_p, typical_p))
    expected = TypicalLogitsWarper(mass)(None, left)  # type: ignore[arg-type]
    asked = torch.from_numpy(typical_p < 1.0)
    assert torch.equal(found[asked], expected[asked])
    assert torch.equal(found[~asked], left[~asked])
    assert not torch.equal(found[asked], left[asked])


def test_looking_at_few_tokens_changes_no_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU filtered rows look at their most likely tokens first; all cases, ties and flat rows included."""
    generator = np.random.default_rng(1)
    rows, vocab = 300, 1000
    logits = random_logits(rows, vocab, seed=2)
    logits[::5] = logits[::5].round()  # many ties, also at the edge of the few
    logits[::11] *= 0.01  # flat: the few do not hold what is kept
    settings = settings_of(
        rows,
        temperature=generator.choice([0.0, 0.7, 1.0, 3.0], rows),
        top_k=generator.choice([0, 0, 1, 40, 255, 256, 600], rows),
        top_p=generator.choice([1.0, 0.3, 0.9, 0.99], rows),
        min_p=generator.choice([0.0, 0.0, 0.05], rows),
        seed=np.arange(rows),
        position=generator.integers(0, 4000, rows),
    )
    drawn = settings.temperature > 0
    filters = Filters(settings.top_k, settings.top_p, settings.min_p, settings.typical_p).of(
        np.nonzero(drawn)[0]
    )
    few = filters.rows_that_keep_few(vocab)
    assert len(few) > 100
    found = sample(logits, settings).token_ids
    monkeypatch.setattr(sampler, "FEW", vocab)  # never
    assert torch.equal(found, sample(logits, settings).token_ids)


def test_greedy_takes_the_lowest_id_among_equals_and_any_seed() -> None:
    logits = torch.zeros(3, 50)
    logits[1, [20, 30]] = 1.0
    chosen = sample(logits, settings_of(3, temperature=0.0, seed=[1, 2, 3])).token_ids
    assert chosen.tolist() == [0, 20, 0]


def test_a_row_draws_the_same_whatever_is_in_the_batch() -> None:
    logits = random_logits(40, 300)
    temperature = np.where(np.arange(40) % 3 == 0, 0.0, 0.8)
    everything = settings_of(
        40, temperature=temperature, seed=np.arange(40), position=np.arange(40) + 5, top_p=0.9
    )
    together = sample(logits, everything).token_ids
    for i in (0, 1, 17, 39):
        one = settings_of(1, temperature=temperature[i], seed=i, position=i + 5, top_p=0.9)
        assert sample(logits[i : i + 1], one).token_ids.tolist() == [int(together[i])]


def test_a_tiny_temperature_is_greedy_and_the_extremes_stay_finite() -> None:
    logits = random_logits(5, 80) * 1000
    for temperature in (1e-300, 1e-9):
        chosen = sample(logits, settings_of(5, temperature=temperature, seed=np.arange(5))).token_ids
        assert chosen.tolist() == logits.argmax(-1).tolist()
    # u is clamped below 1: a token that is the only one left is chosen whatever its noise.
    chosen = sample(logits, settings_of(5, top_k=1, seed=np.arange(5))).token_ids
    assert chosen.tolist() == logits.argmax(-1).tolist()


def test_banned_tokens_are_never_chosen_but_keep_their_log_probability() -> None:
    logits = random_logits(2, 30)
    best = logits.argmax(-1).tolist()
    settings = settings_of(
        2,
        temperature=[0.0, 1.0],
        num_logprobs=1,
        edits=(
            LogitEdits(0, None, None, banned=(best[0],)),
            LogitEdits(1, None, None, banned=tuple(range(29))),
        ),
    )
    sampled = sample(logits, settings)
    assert sampled.token_ids.tolist() == [int(logits[0].topk(2).indices[1]), 29]
    assert sampled.logprobs is not None
    entries = sampled.logprobs.entries([1, 1])
    assert entries[0].rank == 2
    assert entries[0].top_ids == (best[0],)


def test_edited_logits_equal_the_definitions_of_transformers() -> None:
    """Repetition counts prompt and output once, frequency each output, presence any output; biases come before them."""
    logits = random_logits(1, 12, dtype=torch.float64)
    prompt, output = [3, 4, 4, 5], [5, 6, 6, 7]
    controls = Controls(len(prompt), 1.4, 0.25, 0.5, {3: 2.5, 6: -1.5, 9: 0.75})
    ids, values = controls.marks(prompt + output)
    assert dict(zip(ids.tolist(), values.tolist(), strict=True)) == {3: 1, 4: 1, 5: 3, 6: 4, 7: 2}
    marks, bias = np.zeros(12, dtype=np.int16), np.zeros(12, dtype=np.float32)
    marks[ids] = values
    bias[list(controls.biases)] = list(controls.biases.values())
    edits = (LogitEdits(0, bias, marks, (1.4, 0.25, 0.5)),)
    text = torch.tensor([prompt + output])
    expected = SequenceBiasLogitsProcessor({(i,): b for i, b in controls.biases.items()})(text, logits)
    expected = RepetitionPenaltyLogitsProcessor(1.4)(text, expected)
    for token in output:
        expected[0, token] -= 0.25
    expected[0, sorted(set(output))] -= 0.5
    # Biases of this test are exact in float32.
    torch.testing.assert_close(sampler._edited(logits, edits), expected, rtol=1e-15, atol=1e-15)


def test_marks_end_where_their_type_does() -> None:
    ids, values = Controls(1, frequency=0.1).marks([2] + [2] * 20_000)
    assert (ids.tolist(), values.tolist()) == ([2], [FULL + IN_PROMPT])


def test_log_probabilities_are_those_of_the_raw_logits() -> None:
    logits = random_logits(4, 60, dtype=torch.float64)
    settings = settings_of(
        4, temperature=[0.0, 0.3, 2.0, 1.0], top_k=[0, 5, 0, 3], num_logprobs=[2, -1, 0, 5], seed=4
    )
    sampled = sample(logits, settings)
    assert sampled.logprob_rows == (0, 2, 3)
    assert sampled.logprobs is not None
    expected = logits.log_softmax(-1)
    for row, entry in zip(sampled.logprob_rows, sampled.logprobs.entries([2, 0, 5]), strict=True):
        token = int(sampled.token_ids[row])
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(float(expected[row, token]), abs=1e-12)
        assert (
            entry.rank == sorted(expected[row].tolist(), reverse=True).index(float(expected[row, token])) + 1
        )
        top = expected[row].topk(len(entry.top_ids))
        assert list(entry.top_ids) == top.indices.tolist()
        assert list(entry.top_logprobs) == pytest.approx(top.values.tolist(), abs=1e-12)
    assert [len(e.top_ids) for e in sampled.logprobs.entries([2, 0, 5])] == [2, 0, 5]


def test_a_greedy_batch_does_little_but_argmax() -> None:
    called = []

    class Listing(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(getattr(function, "__name__", str(function)))
            return function(*args, **(kwargs or {}))

    logits = random_logits(8, 100)
    with Listing():
        sample(logits, settings_of(8, temperature=0.0, top_k=5, top_p=0.5))
    looks_for_nan = ["lt", "all", "where", "numpy"]
    assert [name for name in called if name not in ("__len__", "__get__")] == ["argmax", *looks_for_nan]
