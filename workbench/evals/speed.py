"""Speed of two versions: each alone, in alternating blocks, on the same requests.

One block is a handful of requests to one version while the other rests. Neighbouring blocks form a pair with the same requests;
every other pair runs B first, so that neither version always finds the warmer machine. A block of each comes first and is thrown
away. A noisy machine gets more pairs, until the interval of the time per token is narrow enough or the limit is reached. Every answer has the same number of tokens (the end of sequence is ignored), so that a version cannot look fast by saying
less. Requests differ from pair to pair: the prefix cache of one pair does not serve the next.

Boundary: measures through a backend and gives intervals (`statistics.block_bootstrap`). Load tests are `workbench.bench`'s.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.evals.datasets import Dataset, Example
from workbench.evals.errors import RequestsFailedError
from workbench.evals.evaluate import CheckCancelled, OnProgress
from workbench.evals.statistics import CONFIDENCE, RESAMPLES, Interval, block_bootstrap

if TYPE_CHECKING:
    from workbench.backends.protocol import Backend

# name -> (unit, higher is better)
SPEED_METRICS: dict[str, tuple[str, bool]] = {
    "ttft_ms": ("ms", False),
    "tpot_ms": ("ms", False),
    "e2e_ms": ("ms", False),
    "output_tokens_per_s": ("tokens/s", True),
}


@dataclass(frozen=True, slots=True)
class SpeedOptions:
    """How speed is measured: `pairs` of blocks, and as many again up to `max_pairs` while the interval of the time per token is
    wider than ± `precision_percent`; `requests` a block, `concurrency` at once, `max_tokens` output tokens each."""

    pairs: int = 12
    max_pairs: int = 48
    precision_percent: float = 5.0
    requests: int = 4
    concurrency: int = 4
    max_tokens: int = 32
    seed: int = 0


@dataclass(frozen=True, slots=True)
class SpeedRow:
    """One request of one block."""

    pair: int
    version: str  # "a" or "b"
    example_id: str
    ttft_ms: float
    tpot_ms: float
    e2e_ms: float
    output_tokens: int
    block_tokens_per_s: float  # of the whole block that it ran in


@dataclass(frozen=True, slots=True)
class SpeedMetric:
    """One figure of both versions. `percent`: B's change relative to A. n: pairs of blocks."""

    name: str
    unit: str
    higher_is_better: bool
    a: float
    b: float
    diff: float
    low: float | None
    high: float | None
    percent: float
    percent_low: float | None
    percent_high: float | None
    n: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_speed(
    backend: Backend,
    model_a: str,
    model_b: str,
    dataset: Dataset,
    options: SpeedOptions | None = None,
    *,
    on_progress: OnProgress | None = None,
    check_cancelled: CheckCancelled | None = None,
) -> list[SpeedRow]:
    """Run the blocks; all measured requests in the order in which they ran.

    Raises:
        RequestsFailedError: a request failed.
    """
    options = options or SpeedOptions()
    models = {"a": model_a, "b": model_b}
    for version in models:  # warm-up, thrown away
        _block(backend, models[version], _requests(dataset, -1, options), -1, version, options)
    rows: list[SpeedRow] = []
    for pair in range(max(options.pairs, options.max_pairs)):
        if pair >= options.pairs and pair % options.pairs == 0 and _is_precise(rows, options):
            break
        for version in ("a", "b") if pair % 2 == 0 else ("b", "a"):
            if check_cancelled is not None:
                check_cancelled()
            requests = _requests(dataset, pair, options)
            rows += _block(backend, models[version], requests, pair, version, options)
        if on_progress is not None:
            on_progress(
                (pair + 1) / max(options.pairs, options.max_pairs), f"Speed: pair of blocks {pair + 1}"
            )
    return rows


def _is_precise(rows: Sequence[SpeedRow], options: SpeedOptions) -> bool:
    """Precision alone decides whether more is measured, never which version looks better: the interval stays honest."""
    found = block_bootstrap(
        _blocks(rows, "a", "tpot_ms"), _blocks(rows, "b", "tpot_ms"), relative=True, resamples=2000
    )
    if found.low is None or found.high is None:
        return False
    return 100 * (found.high - found.low) / 2 <= options.precision_percent


def speed_metrics(
    rows: Sequence[SpeedRow], *, confidence: float = CONFIDENCE, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, SpeedMetric]:
    """Figures and block-bootstrap intervals of the measured requests."""
    found = {}
    for name, (unit, higher_is_better) in SPEED_METRICS.items():
        a, b = _blocks(rows, "a", name), _blocks(rows, "b", name)
        plain = block_bootstrap(a, b, confidence=confidence, resamples=resamples, seed=seed)
        relative = block_bootstrap(a, b, relative=True, confidence=confidence, resamples=resamples, seed=seed)
        found[name] = _metric(name, unit, higher_is_better, a, b, plain, relative)
    return found


def _metric(
    name: str, unit: str, higher_is_better: bool, a: list[np.ndarray], b: list[np.ndarray], plain: Interval,
    relative: Interval,
) -> SpeedMetric:  # fmt: skip
    return SpeedMetric(
        name, unit, higher_is_better, float(np.concatenate(a).mean()), float(np.concatenate(b).mean()),
        plain.estimate, plain.low, plain.high, 100 * relative.estimate,
        None if relative.low is None else 100 * relative.low,
        None if relative.high is None else 100 * relative.high, len(a),
    )  # fmt: skip


def _blocks(rows: Sequence[SpeedRow], version: str, name: str) -> list[np.ndarray]:
    """Values by pair of blocks; throughput has one value a block."""
    pairs = sorted({row.pair for row in rows})
    chosen = [[row for row in rows if row.pair == pair and row.version == version] for pair in pairs]
    if name == "output_tokens_per_s":
        return [np.array([block[0].block_tokens_per_s]) for block in chosen]
    return [np.array([getattr(row, name) for row in block], np.float64) for block in chosen]


def _requests(dataset: Dataset, pair: int, options: SpeedOptions) -> list[Example]:
    """The requests of one pair of blocks; the dataset is gone through again when it is too short."""
    start = (pair + 1) * options.requests
    return [dataset.examples[(start + i) % len(dataset)] for i in range(options.requests)]


def _block(
    backend: Backend, model_id: str, examples: list[Example], pair: int, version: str, options: SpeedOptions
) -> list[SpeedRow]:
    from engine import SamplingParams

    params = SamplingParams(
        max_tokens=options.max_tokens,
        min_tokens=options.max_tokens,
        ignore_eos=True,
        temperature=0.0,
        seed=options.seed,
    )
    started = time.perf_counter()
    completions = backend.chat(
        [list(example.messages) for example in examples],
        params,
        model=model_id,
        max_concurrency=options.concurrency,
    )
    elapsed_s = time.perf_counter() - started
    failed = next((c for c in completions if c.error or c.ttft_ms is None), None)
    if failed is not None:
        raise RequestsFailedError(
            f"a request to {model_id} failed while its speed was measured: {failed.error}", value=model_id
        )
    rate = sum(c.num_output_tokens for c in completions) / elapsed_s
    return [
        SpeedRow(
            pair, version, example.id, float(c.ttft_ms or 0.0), float(c.tpot_ms or 0.0), c.e2e_ms,
            c.num_output_tokens, rate,
        )
        for example, c in zip(examples, completions, strict=True)
    ]  # fmt: skip
