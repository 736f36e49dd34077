"""The torch form of device sampling: the runner's tokens, the right distribution, no question to the host; and its judge."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine.kernels.random_sampling import (
    FILTERED,
    PLAIN,
    TYPICAL,
    SamplingStep,
    sampling_step,
    settings_of,
    wrong_rows,
)
from engine.kernels.sampling import sample_tokens_ref
from engine.runner.sampler import SampleSettings, sample


def run(step: SamplingStep, *, is_filtered: bool = True, is_typical: bool = False) -> Tensor:
    out = torch.full_like(step.rows, -1)
    sample_tokens_ref(
        step.logits, step.rows, step.positions, step.settings, out, is_filtered=is_filtered, is_typical=is_typical,
        mask=step.mask,
    )  # fmt: skip
    return out


def host_settings(step: SamplingStep) -> SampleSettings:
    """The same settings as the runner's sampler takes them."""
    rows = step.rows.long()
    column = {
        name: getattr(step.settings, name)[rows].numpy()
        for name in ("temperature", "top_k", "top_p", "min_p", "typical_p")
    }
    low, high = (
        half[rows].numpy().astype(np.int64) for half in (step.settings.seed_low, step.settings.seed_high)
    )
    return SampleSettings(
        temperature=column["temperature"].astype(np.float64),
        top_k=column["top_k"].astype(np.int64),
        top_p=column["top_p"].astype(np.float64),
        min_p=column["min_p"].astype(np.float64),
        typical_p=column["typical_p"].astype(np.float64),
        seed=(high << 32) | (low & 0xFFFFFFFF),
        position=step.positions.numpy().astype(np.int64),
        num_logprobs=np.full(len(rows), -1),
    )


# Dozens of seeds of every kind. Where tokens differ, the judge must find both right: then rounding decided.
@pytest.mark.parametrize(("vocab", "num_rows"), [(61, 720), (4096, 108), (128256, 18)])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_tokens_are_those_of_the_runners_sampler(vocab: int, num_rows: int, masked: bool) -> None:
    step = sampling_step(PLAIN + FILTERED, vocab, num_rows=num_rows, seed=vocab, masked=masked)
    found = run(step)
    expected = sample(step.logits.masked_fill(~step.allowed, float("-inf")), host_settings(step)).token_ids
    differ = torch.nonzero(found != expected).flatten().tolist()
    assert len(differ) <= num_rows // 100, differ
    assert wrong_rows(step, found) == []
    assert not set(wrong_rows(step, expected)) & set(differ)


@pytest.mark.parametrize(("vocab", "num_rows"), [(61, 216), (4096, 27)])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_typical_tokens_are_those_of_the_runners_sampler(vocab: int, num_rows: int, masked: bool) -> None:
    step = sampling_step(TYPICAL + FILTERED + PLAIN, vocab, num_rows=num_rows, seed=vocab, masked=masked)
    found = run(step, is_typical=True)
    expected = sample(step.logits.masked_fill(~step.allowed, float("-inf")), host_settings(step)).token_ids
    differ = torch.nonzero(found != expected).flatten().tolist()
    assert len(differ) <= 1 + num_rows // 100, differ
    assert wrong_rows(step, found) == []
    assert not set(wrong_rows(step, expected)) & set(differ)
    without = set(torch.nonzero(run(step) != found).flatten().tolist())
    assert without <= {i for i in range(num_rows) if step.settings.typical_p[step.rows[i]] < 1.0}
    assert len(without) > num_rows // 20, "typical_p changes what is drawn"


def test_rows_without_filters_need_no_search() -> None:
    step = sampling_step(PLAIN, 4096, num_rows=60, seed=1)
    assert torch.equal(run(step, is_filtered=False), run(step, is_filtered=True))


def test_the_judge_accepts_only_what_rounding_excuses() -> None:
    step = sampling_step(PLAIN + FILTERED + TYPICAL, 61, num_rows=216, masked=True)
    right = run(step, is_typical=True)
    assert wrong_rows(step, right) == []
    assert len(wrong_rows(step, (right + 1) % 61)) == 216
    # What a mistake of one token in a filter, or of one bit in the noise, would give.
    for name, change in {"top_k": 1, "seed_low": 1, "typical_p": 0.05}.items():
        values = {field: getattr(step.settings, field) for field in step.settings.__slots__}
        values[name] = values[name] + change
        other = SamplingStep(step.logits, step.rows, step.positions, type(step.settings)(**values), step.mask)
        assert wrong_rows(step, run(other, is_typical=True)), name


@pytest.mark.parametrize("kind", [{"temperature": 0.8}, {"top_k": 6, "top_p": 0.85}, {"min_p": 0.1}], ids=str)
def test_draws_follow_the_softmax_of_what_is_kept(kind: dict[str, float]) -> None:
    draws, vocab = 20_000, 12
    logits = 1.5 * torch.randn(1, vocab, generator=torch.Generator().manual_seed(3)).expand(draws, -1)
    step = SamplingStep(
        logits, torch.zeros(draws).int(), torch.arange(draws).int(), settings_of([kind], seed=11)
    )
    counts = torch.bincount(run(step), minlength=vocab).double()
    values = logits[0].double() / kind.get("temperature", 1.0)
    is_kept = kept_of(values.softmax(-1), kind)
    assert counts[~is_kept].sum() == 0
    limit = CHI_SQUARE[int(is_kept.sum()) - 1]
    assert chi_square(counts[is_kept], values[is_kept]) < limit
    # The same counts against a temperature that is a fifth off: the test sees it.
    assert chi_square(counts[is_kept], values[is_kept] * 1.2) > limit


# The upper 0.1 % points by degrees of freedom.
CHI_SQUARE = {3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46, 7: 24.32, 8: 26.12, 9: 27.88, 10: 29.59, 11: 31.26}


def kept_of(p: Tensor, kind: dict[str, float]) -> Tensor:
    """Which tokens of these probabilities the filters keep, one filter after the other."""
    p = torch.where(p >= kind.get("min_p", 0.0) * p.max(), p, 0.0)
    if "top_k" in kind:
        p = torch.where(p >= p.topk(int(kind["top_k"])).values[-1], p, 0.0)
    ordered, order = (p / p.sum()).sort(descending=True)
    is_kept = p > 0
    is_kept[order[ordered.cumsum(-1) - ordered >= kind.get("top_p", 2.0)]] = False
    return is_kept


def chi_square(counts: Tensor, values: Tensor) -> float:
    """Pearson's statistic of counts against the softmax of values."""
    expected = values.softmax(-1) * counts.sum()
    assert expected.min() > 5
    return float(((counts - expected) ** 2 / expected).sum())


def test_nothing_is_asked_of_the_host_and_shapes_never_depend_on_data() -> None:
    """The operations and their shapes are the same for whatever values: so a CUDA graph can hold them."""
    asking = {"aten::_local_scalar_dense", "aten::nonzero", "aten::item", "aten::is_nonzero"}

    class Listing(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[tuple[str, tuple[torch.Size, ...]]] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func._schema.name
            assert name not in asking, name
            assert not (
                name == "aten::index" and any(i is not None and i.dtype == torch.bool for i in args[1])
            )
            self.seen.append((name, tuple(a.shape for a in args if isinstance(a, Tensor))))
            return func(*args, **(kwargs or {}))

    seen = []
    for kinds, seed in ((PLAIN, 0), (FILTERED, 1), (({"temperature": 0.0},), 2)):
        step = sampling_step(kinds, 61, num_rows=8, seed=seed, masked=True)
        with Listing() as listing:
            run(step)
        seen.append(listing.seen)
    assert seen[0] == seen[1] == seen[2]
    assert len(seen[0]) > 50
