"""best_of: of several completions of one prompt, those with the highest mean log-probability a token.

Source: OpenAI's completions ("the one with the highest log probability per token"). Log-probabilities are those of the raw
logits, whatever the temperature and the filters that drew the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from engine.records import Completion
from engine.request import FinishReason
from engine.sampling_params import SamplingParams


def choose_best(completions: Sequence[Completion], params: SamplingParams) -> list[Completion]:
    """Of the completions of ``params.each()`` those to return: all in their order, or the n best, the best first.

    One that failed is chosen only where too few others are left. Log-probabilities that nobody asked for are taken off.
    """
    if not params.chooses:
        return list(completions)
    best = sorted(completions, key=_rank)[: params.n]  # stable: the earlier seed among equals
    return best if params.logprobs is not None else [replace(completion, logprobs=()) for completion in best]


def _rank(completion: Completion) -> tuple[bool, float]:
    failed = completion.finish_reason.is_failure or completion.finish_reason is FinishReason.ABORT
    if not completion.logprobs:
        return failed, math.inf
    total = math.fsum(entry.logprob for entry in completion.logprobs)
    return failed, -total / len(completion.logprobs)
