"""What quantized KV caches and weights cost the bundled model, and that the report says what an engine answers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from engine.bench.parts.quality import Quality, Variant, measure_kv_caches, measure_variants
from engine.config import EngineConfig
from engine.errors import InvalidRequestError
from engine.llm import LLM
from engine.tokenizer import Tokenizer

FOLDER = Path(__file__).parents[3] / "data" / "models" / "chat-base"
TEXTS = {
    "Count the items: fork, lamp, onion.": "There are 3 items.",
    "Context:\n[1] Ventonni lives in Yansu.\n[2] Parase is a judge.\n\nQuestion: Where does Ventonni live?":
        "Ventonni lives in Yansu [1].",
    "Hello, how are you today?": "Hello! I am fine, thank you. How can I help you today?",
}  # fmt: skip
# Nats a token; measured on a CPU in float32, by torch and by the compiled kernels: 0.000017, 0.00012 and 0.0030.
MAX_DIVERGENCE = {"bfloat16": 0.00005, "int8": 0.0003, "fp8": 0.006}


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    tokenizer = Tokenizer.from_pretrained(FOLDER)
    return [
        [
            *tokenizer.apply_chat_template([{"role": "user", "content": asked}]),
            *tokenizer.encode(answer, add_special_tokens=False),
        ]
        for asked, answer in TEXTS.items()
    ]


def settings_of(**changes: Any) -> dict[str, Any]:
    return {"dtype": "float32", "device": "cpu", "num_threads": 1, **changes}


@pytest.fixture(scope="module")
def report(texts: list[list[int]]) -> dict[str, Quality]:
    found = measure_kv_caches(EngineConfig(model=str(FOLDER), **settings_of()), texts, list(MAX_DIVERGENCE))
    for quality in found:
        print(quality)
    return {quality.variant.kv_cache_dtype: quality for quality in found}


def test_distributions_stay_close(report: dict[str, Quality]) -> None:
    plain = report["auto"]
    assert plain.num_tokens == 105
    assert (plain.mean_kl, plain.max_kl, plain.same_top) == (0.0, 0.0, 1.0)
    for stored, bound in MAX_DIVERGENCE.items():
        quality = report[stored]
        assert bound / 10 < quality.mean_kl <= bound, stored
        assert quality.mean_kl <= quality.max_kl <= 50 * bound
        # Of the scored tokens alone, whose probabilities move up as well as down: 0.04 % and 0.02 % were measured.
        assert quality.perplexity == pytest.approx(plain.perplexity, rel=0.01)
    assert report["int8"].mean_kl < report["fp8"].mean_kl, "int8 is the more accurate"


@pytest.mark.parametrize("stored", ["auto", "int8", "fp8"])
def test_the_perplexity_is_the_one_that_an_engine_scores(
    stored: str, texts: list[list[int]], report: dict[str, Quality]
) -> None:
    with LLM(FOLDER, **settings_of(kv_cache_dtype=stored, max_model_len=128, num_blocks=32)) as llm:
        scores = llm.score(texts, use_tqdm=False)
    logprobs = [value for score in scores for value in score.logprobs]
    assert len(logprobs) == report[stored].num_tokens
    # Both are the compiled kernels where there are any, whose bits do not depend on blocks and batch; else torch's, in sums
    # of another order.
    assert report[stored].perplexity == pytest.approx(math.exp(-sum(logprobs) / len(logprobs)), rel=1e-3)


@pytest.mark.parametrize("texts", [[], [[1]], [[1, 2, 3], []], [[1] * 100_000]])
def test_texts_that_cannot_be_scored_are_refused(texts: list[list[int]]) -> None:
    with pytest.raises(InvalidRequestError, match="token"):
        measure_kv_caches(EngineConfig(model=str(FOLDER), **settings_of()), texts)


@pytest.fixture(scope="module")
def weights_report(texts: list[list[int]]) -> dict[Variant, Quality]:
    variants = [Variant("int8"), Variant("int4"), Variant("int8", "int8")]
    found = measure_variants(EngineConfig(model=str(FOLDER), **settings_of()), texts, variants)
    for quality in found:
        print(quality)
    return {quality.variant: quality for quality in found}


def test_fewer_bits_cost_more(weights_report: dict[Variant, Quality]) -> None:
    """Measured on a CPU in float32: 0.0006 and 0.09 nats; the cache's int8 adds to the weights' as little as it costs alone."""
    int8, int4, both = (weights_report[Variant(*v)] for v in (("int8",), ("int4",), ("int8", "int8")))
    assert 0.0001 < int8.mean_kl < 0.003 < 0.03 < int4.mean_kl < 0.3
    assert int8.mean_kl != both.mean_kl
    assert both.mean_kl < 2 * int8.mean_kl
    assert 0.5 < int4.same_top < int8.same_top <= 1.0
    assert all(quality.num_tokens == 105 for quality in weights_report.values())


def test_quantized_weights_score_as_an_engine_scores_them(
    texts: list[list[int]], weights_report: dict[Variant, Quality]
) -> None:
    with LLM(FOLDER, **settings_of(quantization="int4", max_model_len=128, num_blocks=32)) as llm:
        logprobs = [value for score in llm.score(texts, use_tqdm=False) for value in score.logprobs]
    perplexity = math.exp(-sum(logprobs) / len(logprobs))
    # An engine keeps its cache in bfloat16 only where its dtype is automatic: both hold float32 here.
    assert weights_report[Variant("int4")].perplexity == pytest.approx(perplexity, rel=1e-3)
