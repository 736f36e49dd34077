"""Sampling and log-probability kernels against their references: every kind of row, edges of parts, and odd logits."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.kernels.logprobs import token_logprobs
from engine.kernels.random_sampling import (
    FILTERED,
    PLAIN,
    TYPICAL,
    SamplingStep,
    sampling_step,
    settings_of,
    wrong_rows,
)
from engine.kernels.sampling import sample_tokens, sample_tokens_ref
from engine.kernels.sampling_filters import TILE
from engine.runner.sampler import token_logprobs as runner_logprobs

INF = math.inf


def run(
    step: SamplingStep, *, is_filtered: bool = True, is_typical: bool = False, reference: bool = False
) -> Tensor:
    out = torch.full_like(step.rows, -1)
    function = sample_tokens_ref if reference else sample_tokens
    function(
        step.logits, step.rows, step.positions, step.settings, out, is_filtered=is_filtered, is_typical=is_typical,
        mask=step.mask,
    )  # fmt: skip
    return out


def one_row(
    logits: list[float], draws: int, kind: dict[str, float], mask: Tensor | None = None
) -> SamplingStep:
    """The same row at `draws` positions."""
    return SamplingStep(
        torch.tensor([logits]).expand(draws, -1), torch.zeros(draws).int(), torch.arange(draws).int(),
        settings_of([kind]), mask,
    )  # fmt: skip


# Vocabularies inside a part, of a part and one more, of several parts, and of many (a row of all three filters).
@pytest.mark.parametrize(
    ("vocab", "num_rows", "masked"),
    [(61, 16, True), (TILE + 1, 4, False), (4096, 3, True), (32001, 1, False)],
)
def test_filtered_rows(vocab: int, num_rows: int, masked: bool) -> None:
    kinds = FILTERED[:-1] + PLAIN[:4] if num_rows > 8 else FILTERED[-2:-10:-1]
    step = sampling_step(kinds, vocab, num_rows=num_rows, seed=vocab, masked=masked)
    found = run(step)
    assert wrong_rows(step, found) == []
    assert int((found != run(step, reference=True)).sum()) <= num_rows // 20


@pytest.mark.parametrize(
    ("vocab", "num_rows", "masked"), [(61, 18, True), (TILE + 1, 4, False), (4096, 2, True)]
)
def test_typical_rows(vocab: int, num_rows: int, masked: bool) -> None:
    """Alone and beside rows that do not ask; a row's bits are its own."""
    kinds = TYPICAL + FILTERED[-3:] + PLAIN[:2] if num_rows > 8 else TYPICAL[-2:-6:-1]
    step = sampling_step(kinds, vocab, num_rows=num_rows, seed=vocab, masked=masked)
    found = run(step, is_typical=True)
    assert wrong_rows(step, found) == []
    assert int((found != run(step, is_typical=True, reference=True)).sum()) <= num_rows // 18
    assert torch.equal(run(step.part(slice(0, 1)), is_typical=True), found[:1])


@pytest.mark.parametrize(
    ("vocab", "num_rows", "masked"), [(1, 2, False), (61, 30, True), (4097, 10, False), (128256, 1, True)]
)
def test_rows_without_filters(vocab: int, num_rows: int, masked: bool) -> None:
    kinds = PLAIN if num_rows > 1 else PLAIN[:1]
    step = sampling_step(kinds, vocab, num_rows=num_rows, seed=vocab, masked=masked)
    found = run(step, is_filtered=False)
    assert wrong_rows(step, found) == []
    assert int((found != run(step, is_filtered=False, reference=True)).sum()) <= num_rows // 20


def test_a_row_draws_the_same_whatever_shares_the_batch() -> None:
    step = sampling_step(FILTERED[-3:], 1500, num_rows=4, seed=5)
    together = run(step)
    for i in (0, 3):
        assert torch.equal(run(step.part(slice(i, i + 1))), together[i : i + 1])


FOUR = [0.5] * 4
STAIRS = [0.1 * i for i in range(10)]
NEAR = [1.0 + i * 2.0**-23 for i in range(4)]  # neighbours among the floats
# The likeliest token in the second part; of the three behind it, equal and in both parts, top_p needs two.
EDGE = [-9.0] * 2 * TILE
EDGE[TILE + 3] = 1.0 + math.log(2.0)
for place in (4, TILE, TILE + 9):
    EDGE[place] = 1.0


@pytest.mark.parametrize(
    ("logits", "kind", "keeps", "drops"),
    [
        (FOUR, {"top_p": 0.5}, [1], [2]),
        (FOUR, {"top_p": 0.501}, [2], [3]),
        (FOUR, {"top_p": 1e-9}, [0], [1]),
        (FOUR, {"top_k": 1}, [0, 3], []),
        (STAIRS, {"top_k": 1}, [9], [8]),
        (STAIRS, {"top_k": 3}, [7], [6]),
        (STAIRS, {"min_p": 0.75}, [7], [6]),  # exp(-0.2) and exp(-0.3) on either side
        (STAIRS, {"top_p": 0.5}, [6], [5]),
        (STAIRS, {"top_p": 0.5, "top_k": 5}, [7], [6]),  # of what top_k keeps
        (NEAR, {"top_k": 2}, [2], [1]),
        (NEAR, {"top_p": 0.5}, [2], [1]),
        (EDGE, {"top_p": 0.7}, [4, TILE, TILE + 3], [TILE + 9]),
        ([-0.0, 0.0, -0.0, -1.0], {"top_k": 1}, [0, 1, 2], [3]),  # both zeros are equal
    ],
)
def test_filters_cut_where_they_should(
    logits: list[float], kind: dict[str, float], keeps: list[int], drops: list[int]
) -> None:
    """At positions where these very tokens would win without filters: the last ones kept win, the first dropped do not."""
    free = one_row(logits, 3000, {})
    winners = run(free, is_filtered=False, reference=True).tolist()
    positions = torch.tensor([winners.index(token) for token in keeps + drops]).int()
    step = one_row(logits, len(positions), kind)
    found = run(replace(step, positions=positions)).tolist()
    assert found[: len(keeps)] == keeps
    assert all(token != dropped for token, dropped in zip(found[len(keeps) :], drops, strict=True))


def test_equal_logits_greedy_takes_the_lowest_id() -> None:
    assert run(one_row([-1.0, -0.0, 0.0], 1, {"temperature": 0.0})).tolist() == [1]


@pytest.mark.parametrize(
    "kind", [{}, {"temperature": 0.0}, {"top_k": 2, "top_p": 0.9, "min_p": 0.1}], ids=str
)
def test_odd_logits(kind: dict[str, float]) -> None:
    nan, cases = math.nan, []
    cases.append(([-INF, 2.0, -INF, nan], {1}))  # not-a-number counts as -inf
    cases.append(([nan, -INF, nan], {0}))
    cases.append(([-INF] * 5, {0}))
    cases.append(([1.0, INF, 1e38, INF], {1} if kind == {"temperature": 0.0} else {1, 3}))
    cases.append(([1e38, -1e38, 1.0], {0}))
    for logits, possible in cases:
        assert set(run(one_row(logits, 2, kind)).tolist()) <= possible, (logits, kind)
    mask = torch.tensor([[0b1100]]).int()
    assert run(one_row([5.0, nan, -INF, -INF], 1, kind, mask)).tolist() == [2], "not allowed"
    assert run(one_row([5.0, nan, -INF, 1.0], 1, kind, torch.zeros_like(mask))).tolist() == [0]


def test_no_rows_is_no_work() -> None:
    step = sampling_step(PLAIN, 61, num_rows=1).part(slice(0, 0))
    assert run(step).shape == (0,)
    assert token_logprobs(step.logits, step.rows, 3).top_ids.shape == (0, 3)


@pytest.mark.parametrize(
    ("vocab", "num_rows", "num_top"), [(7, 3, 20), (61, 5, 0), (4097, 5, 5), (50257, 1, 20)]
)
def test_logprobs(vocab: int, num_rows: int, num_top: int) -> None:
    logits = sampling_step(({},), vocab, num_rows=num_rows, seed=vocab).logits + 100.0
    tokens = torch.randint(0, vocab, (num_rows,), generator=torch.Generator().manual_seed(2)).int()
    tokens[0] = logits[0].argmax()
    found, expected = (
        token_logprobs(logits, tokens, num_top),
        runner_logprobs(logits.double(), tokens, num_top),
    )
    # Values of about 100 are spaced by 8e-6, and two of them are subtracted.
    torch.testing.assert_close(found.chosen.double(), expected.chosen, rtol=0, atol=2e-5)
    torch.testing.assert_close(found.top_values.double(), expected.top_values, rtol=0, atol=2e-5)
    assert torch.equal(found.rank, (logits > logits.gather(1, tokens[:, None].long())).sum(-1) + 1)
    order = logits.sort(dim=-1, descending=True, stable=True).indices[:, :num_top]
    assert torch.equal(found.top_ids, order)
    alone = token_logprobs(logits[1:2], tokens[1:2], num_top)
    assert torch.equal(alone.chosen, found.chosen[1:2])
    assert torch.equal(alone.top_values, found.top_values[1:2])


def test_logprobs_of_forbidden_tokens() -> None:
    logits = torch.tensor([[0.0, -INF, math.log(3.0), -INF]])
    found = token_logprobs(logits, torch.tensor([1]).int(), 4)
    assert found.chosen.tolist() == [-INF]
    assert found.rank.tolist() == [3]
    assert found.top_ids.tolist() == [[2, 0, 1, 3]]
    assert found.top_values[0].exp().tolist() == pytest.approx([0.75, 0.25, 0.0, 0.0])


def test_what_is_not_float32_or_not_dense_is_refused() -> None:
    step = sampling_step(PLAIN, 61, num_rows=2)
    with pytest.raises(AssertionError):
        run(replace(step, logits=step.logits.double()))
    with pytest.raises(AssertionError):
        run(replace(step, logits=step.logits.t().contiguous().t()))
