"""Random sampling steps, all kinds of rows in one batch, and the judge of the tokens chosen for them.

Boundary: for tests. The judge sorts, in float64, by the definition; it shares nothing with the kernels but the noise.
Shapes: n rows to choose for, R rows of settings, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.kernels.gumbel import MIN_TEMPERATURE, gumbel_noise, mix_keys
from engine.kernels.sampling import RowSettings

# Rows as people ask for them, and the ends of every range.
PLAIN: tuple[dict[str, float], ...] = (
    {}, {"temperature": 0.0}, {"temperature": 1e-9}, {"temperature": 0.6}, {"temperature": 3.0},
)  # fmt: skip
FILTERED: tuple[dict[str, float], ...] = (
    {"top_k": 1}, {"top_k": 50}, {"top_k": 10**6}, {"top_p": 0.9}, {"top_p": 0.9999}, {"top_p": 1e-6},
    {"min_p": 0.05}, {"min_p": 1.0}, {"top_k": 40, "top_p": 0.8}, {"top_k": 7, "min_p": 0.1},
    {"top_p": 0.95, "min_p": 0.02, "temperature": 1.5}, {"top_k": 20, "top_p": 0.95, "min_p": 0.01, "temperature": 0.7},
    {"temperature": 0.0, "top_k": 3, "top_p": 0.5, "min_p": 0.5},
)  # fmt: skip
TYPICAL: tuple[dict[str, float], ...] = (
    {"typical_p": 0.2}, {"typical_p": 0.95}, {"typical_p": 1e-6}, {"typical_p": 0.9999},
    {"typical_p": 0.5, "temperature": 1.5}, {"typical_p": 0.6, "top_k": 40}, {"typical_p": 0.7, "top_p": 0.9},
    {"typical_p": 0.4, "min_p": 0.02, "top_p": 0.95, "temperature": 0.7}, {"typical_p": 0.3, "temperature": 0.0},
)  # fmt: skip
SUM_ULPS = 4  # of the larger term: the division, two logarithms and an addition
NUCLEUS_MARGIN = 1e-5  # of probability
DISTANCE_MARGIN = 1e-4  # of a distance from the mean: of float32 values up to 100, and of what a token at another filter's edge moves
_ULP = 2.0**-23


@dataclass(frozen=True, slots=True)
class SamplingStep:
    """Arguments of `sample_tokens`."""

    logits: Tensor
    rows: Tensor
    positions: Tensor
    settings: RowSettings
    mask: Tensor | None = None

    def part(self, rows: slice) -> SamplingStep:
        """The step of some of its rows."""
        mask = None if self.mask is None else self.mask[rows]
        return SamplingStep(self.logits[rows], self.rows[rows], self.positions[rows], self.settings, mask)

    @property
    def allowed(self) -> Tensor:
        """[n, V] bool."""
        if self.mask is None:
            return torch.ones_like(self.logits, dtype=torch.bool)
        ids = torch.arange(self.logits.shape[1], device=self.mask.device)
        return (self.mask[:, ids // 32] >> (ids % 32)) & 1 != 0


def settings_of(rows: Sequence[dict[str, float]], *, seed: int = 0, device: str = "cpu") -> RowSettings:
    """Settings of these rows; seeds of 64 random bits."""
    defaults: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}
    columns = {
        name: torch.tensor(
            [row.get(name, default) for row in rows],
            dtype=torch.int32 if name == "top_k" else torch.float32,
            device=device,
        )
        for name, default in defaults.items()
    }
    halves = np.random.default_rng(seed).integers(-(2**31), 2**31, (2, len(rows)), dtype=np.int32)
    low, high = torch.from_numpy(halves).to(device)
    return RowSettings(**columns, seed_low=low, seed_high=high)


def sampling_step(
    kinds: Sequence[dict[str, float]],
    vocab: int,
    *,
    num_rows: int,
    seed: int = 0,
    masked: bool = False,
    device: str = "cpu",
) -> SamplingStep:
    """`num_rows` rows of the kinds in turn, in random places; a fifth have rounded logits, that is many equal ones."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(num_rows, vocab, generator=generator)
    logits[::5] = logits[::5].round()
    logits[1::7] *= 0.01  # nearly flat: filters keep most of the row
    rows = torch.randperm(num_rows, generator=generator).int()
    positions = torch.randint(0, 10**5, (num_rows,), generator=generator).int()
    settings = settings_of([kinds[i % len(kinds)] for i in range(num_rows)], seed=seed, device=device)
    mask = None
    if masked:
        words = torch.randint(-(2**31), 2**31, (num_rows, -(-vocab // 32)), generator=generator)
        mask = words.int().to(device)
    return SamplingStep(logits.to(device), rows.to(device), positions.to(device), settings, mask)


def wrong_rows(step: SamplingStep, tokens: Tensor) -> list[int]:
    """Rows whose token [n] no rounding excuses: outside of what may be kept, or beaten by what must be kept."""
    return [i for i in range(len(tokens)) if not _is_right(step, i, int(tokens[i]))]


def _is_right(step: SamplingStep, i: int, token: int) -> bool:
    row = int(step.rows[i])
    one = {field.name: getattr(step.settings, field.name)[row].cpu() for field in fields(RowSettings)}
    allowed = step.part(slice(i, i + 1)).allowed[0].cpu()
    x = step.logits[i].cpu().masked_fill(~allowed, float("-inf"))
    x = x.masked_fill(x.isnan(), float("-inf"))
    if float(one["temperature"]) <= 0.0 or bool((x == float("-inf")).all()):
        best = torch.nonzero(allowed & (x == x.max())).flatten().tolist()
        return token == (best[0] if best else 0)
    x = (x / one["temperature"].clamp(min=MIN_TEMPERATURE)).double()
    must, may = _kept(x, int(one["top_k"]), float(one["top_p"]), float(one["min_p"]))
    if float(one["typical_p"]) < 1.0:
        must, may = _typical(x, must, may, float(one["typical_p"]))
    keys = mix_keys(one["seed_low"][None], one["seed_high"][None], step.positions[i : i + 1].cpu())
    noise = gumbel_noise(keys, torch.arange(len(x), dtype=torch.int32), torch.float64)[0]
    sums = x + noise
    top = int(sums.masked_fill(~must, float("-inf")).argmax())
    largest = max(1.0, *(float(term[j].abs()) for term in (x, noise) for j in (token, top)))
    is_kept = bool(may[token] & allowed[token])
    if not must.any():  # as many as are equally near, and each may be beyond what another rounding keeps
        return is_kept
    return is_kept and float(sums[token]) >= float(sums[top]) - SUM_ULPS * _ULP * largest


def _kept(x: Tensor, top_k: int, top_p: float, min_p: float) -> tuple[Tensor, Tensor]:
    """Which of float64 values [V] every rounding keeps, and which some may."""
    values, order = x.sort(descending=True, stable=True)
    floor = float(values[min(top_k, len(x)) - 1]) if top_k else float("-inf")
    slack = SUM_ULPS * _ULP * max(1.0, abs(float(values[0])))
    least = float(values[0]) + float(np.log(min_p)) if min_p else float("-inf")
    kept = (values >= floor) & (values >= least)
    probability = values.masked_fill(~kept, float("-inf")).softmax(-1)
    before = probability.cumsum(-1) - probability
    limits = (1e9, 1e9) if top_p >= 1.0 else (top_p - NUCLEUS_MARGIN, top_p + NUCLEUS_MARGIN)
    must = (
        (values >= floor) & (values >= least + (slack if least < values[0] else 0.0)) & (before < limits[0])
    )
    may = (values >= floor) & (values >= least - slack) & (before < limits[1])
    must[0] = may[0] = True
    return torch.empty_like(must).scatter_(0, order, must), torch.empty_like(may).scatter_(0, order, may)


def _typical(x: Tensor, must: Tensor, may: Tensor, typical_p: float) -> tuple[Tensor, Tensor]:
    """The same of those that the other filters keep: a token stays where what is nearer to the mean does not reach typical_p."""
    logprob = x.masked_fill(~may, float("-inf")).log_softmax(-1)
    probability = logprob.exp()
    entropy = -(probability * logprob.nan_to_num(neginf=0.0)).sum()
    distance = (-logprob - entropy).abs()
    values, order = distance.sort()
    nearer = torch.cat([torch.zeros(1, dtype=x.dtype), probability[order].cumsum(-1)])

    def mass_within(limit: Tensor) -> Tensor:
        return nearer[torch.searchsorted(values, limit)]

    most = mass_within(distance + DISTANCE_MARGIN) - probability
    least = mass_within(distance - DISTANCE_MARGIN)
    # The nearest stays however small typical_p is, if no other is as near.
    nearest = max(typical_p - NUCLEUS_MARGIN, 1e-12)
    return must & (most < nearest), may & (least < typical_p + NUCLEUS_MARGIN)
