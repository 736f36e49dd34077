"""Speculation on a real decoder: the tokens of an engine without it, whatever is asked for, and so their distribution."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from engine.sampling_params import SamplingParams

GUESSES = {"num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3, "min_gain": 0}
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.7, "seed": 3, "logprobs": 3},
    "filtered": {"temperature": 0.9, "seed": 4, "top_p": 0.8, "top_k": 9, "min_p": 0.02},
    "controlled": {"temperature": 0.8, "seed": 5, "logit_bias": {5: 2.0}, "bad_words": ((7, 9), (3,))},
    "allowed": {"temperature": 1.0, "seed": 6, "allowed_token_ids": tuple(range(6))},
    "stopped": {"temperature": 0.8, "seed": 7, "stop_token_ids": (11, 12), "min_tokens": 12},
    "penalised": {"temperature": 0.8, "seed": 8, "repetition_penalty": 1.2, "max_tokens": 8},
}


@pytest.mark.parametrize(
    "settings",
    [
        {"attention_backend": "reference"},
        {"dtype": "float32", "deterministic": True},
        {"attention_backend": "reference", "num_blocks": 40, "max_num_seqs": 5},  # too few blocks for all
    ],
    ids=["reference", "deterministic", "preempted"],
)
def test_tokens_are_those_without_speculation(
    tiny_models: Callable[..., Any],
    run_engine: Callable[..., Any],
    prompt_of: Callable[..., list[int]],
    settings: dict[str, Any],
) -> None:
    folder = tiny_models("mistral_window").folder
    prompts = {name: 3 * prompt_of(9, seed) for seed, name in enumerate(KINDS)}
    params = {name: SamplingParams(**{"max_tokens": 40, **kind}) for name, kind in KINDS.items()}
    without = run_engine(folder, prompts, params, **settings)
    guessing = run_engine(folder, prompts, params, speculative_config=GUESSES, **settings)
    assert guessing.tokens == without.tokens
    # In float64 and in deterministic mode a position's logits do not depend on what the step computes beside them.
    assert [entry.token_id for entry in guessing.logprobs["sampled"]] == guessing.tokens["sampled"]
    for ours, theirs in zip(guessing.logprobs["sampled"], without.logprobs["sampled"], strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-9)
        assert (ours.rank, ours.top_ids) == (theirs.rank, theirs.top_ids)
    drafted = sum(record.num_draft_tokens for record in guessing.records)
    accepted = sum(record.num_accepted_tokens for record in guessing.records)
    assert 0 < accepted < drafted
    assert sum(len(record.rows) for record in guessing.records) < sum(
        len(record.rows) for record in without.records
    )
    assert bool(guessing.preempted) == ("num_blocks" in settings)


def test_a_guessed_place_has_the_models_distribution(
    tiny_models: Callable[..., Any], run_engine: Callable[..., Any]
) -> None:
    """Pearson's statistic of 1,500 seeds against transformers' probabilities."""
    model, num_runs, allowed = tiny_models("llama2_mha_untied"), 1500, (5, 8, 13, 21)
    prompt = [5, 8, 13, 21, 5, 8, 13, 21]  # all that may come has occurred: each second token is guessed
    params = {
        str(seed): SamplingParams(max_tokens=3, temperature=8.0, seed=seed, allowed_token_ids=allowed)
        for seed in range(num_runs)
    }
    found = run_engine(
        model.folder, dict.fromkeys(params, prompt), params, speculative_config=GUESSES, max_num_seqs=64,
        attention_backend="reference", num_blocks=1024,
    )  # fmt: skip
    first = Counter(tokens[0] for tokens in found.tokens.values()).most_common(1)[0][0]
    counts = Counter(tokens[1] for tokens in found.tokens.values() if tokens[0] == first)
    accepted = sum(record.num_accepted_tokens for record in found.records)
    assert 0 < accepted < sum(record.num_draft_tokens for record in found.records)
    probabilities = (model.logits([*prompt, first])[-1][list(allowed)] / 8.0).softmax(-1)
    expected = probabilities * sum(counts.values())
    assert float(expected.min()) > 5
    statistic = ((torch.tensor([counts[token] for token in allowed]) - expected) ** 2 / expected).sum()
    assert float(statistic) < 16.27  # chi squared with 3 degrees of freedom: 1 in 1,000; seeds are fixed
