"""How far the candidate's next-token distributions lie from the champion's, along the champion's own answers: exact KL, token by token.

Both versions are resident at once and read the same tokens: an example's request as A saw it, and A's answer. What counts are the
answer's tokens.

Boundary: figures of one pair of versions. The rows are compared where the engines are (``engine.scoring``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from workbench.evals.evaluate import CheckCancelled, Evaluation, OnProgress
from workbench.evals.statistics import CONFIDENCE, RESAMPLES, paired_interval

if TYPE_CHECKING:
    from engine.token_kl import TokenKL
    from workbench.backends.protocol import Backend

_TEXTS_A_CALL = 8
_NUM_WORST = 5


@dataclass(frozen=True, slots=True)
class Divergence:
    """KL(A ‖ B) over the whole vocabulary, in nats a token, along A's answers. Of examples whose answer has tokens."""

    mean_kl: float  # over examples, of each answer's mean
    low: float | None  # the confidence limits of mean_kl
    high: float | None
    max_kl: float  # of one token
    same_top: float  # share of tokens at which both find the same one most likely
    n: int
    num_tokens: int
    worst: tuple[tuple[str, float], ...]  # examples with the largest mean, and that mean

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "worst": [list(each) for each in self.worst]}


def measure_divergence(
    backend: Backend,
    model_a: str,
    model_b: str,
    evaluation: Evaluation,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
    on_progress: OnProgress | None = None,
    check_cancelled: CheckCancelled | None = None,
) -> Divergence | None:
    """Of two resident models along the answers of A's evaluation; None where no answer has a token.

    Raises:
        InvalidRequestError: the models have different tokenizers.
    """
    rows = [row for row in evaluation.rows if row.token_ids]
    means: dict[str, float] = {}
    found: list[TokenKL] = []
    for start in range(0, len(rows), _TEXTS_A_CALL):
        if check_cancelled is not None:
            check_cancelled()
        part = rows[start : start + _TEXTS_A_CALL]
        texts = [[*row.prompt_token_ids, *row.token_ids] for row in part]
        for row, one in zip(part, backend.token_kl(texts, model=model_a, other=model_b), strict=True):
            answer = one.last(len(row.token_ids))
            means[row.example_id] = answer.mean_kl
            found.append(answer)
        if on_progress is not None:
            done = start + len(part)
            on_progress(done / len(rows), f"Divergence: {done} of {len(rows)} answers")
    return _summary(found, means, confidence, resamples, seed) if found else None


def _summary(
    found: Sequence[TokenKL], means: dict[str, float], confidence: float, resamples: int, seed: int
) -> Divergence:
    interval = paired_interval(
        list(means.values()), bound=None, confidence=confidence, resamples=resamples, seed=seed
    )
    num_tokens = sum(len(one.kl) for one in found)
    worst = sorted(means.items(), key=lambda each: -each[1])[:_NUM_WORST]
    return Divergence(
        mean_kl=math.fsum(means.values()) / len(means),
        low=interval.low,
        high=interval.high,
        max_kl=max(max(one.kl) for one in found),
        same_top=sum(sum(one.same_top) for one in found) / num_tokens,
        n=len(means),
        num_tokens=num_tokens,
        worst=tuple(worst),
    )
