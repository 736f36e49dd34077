"""Embedding texts and rating pairs of them: which requests that takes, and what their results are.

Models that generate and encoders embed; a cross-encoder reads both texts of a pair at once and rates it. Where there is no
cross-encoder, a pair is rated by the cosine of its embeddings, as vLLM does.

Boundary: requests through a worker; `LLM.embed`, `LLM.rerank`, backends and the API are the ways in. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from engine.errors import InvalidRequestError, PromptTooLongError, StepFailedError
from engine.pooling import SCORE, Pooling, PoolingParams, Vector, finish
from engine.prompts import Prompt
from engine.records import Completion
from engine.request import FinishReason
from engine.sampling_params import SamplingParams
from engine.waiting import finished

if TYPE_CHECKING:
    from engine.tokenizer import TokenizerLike
    from engine.worker import EngineWorker

QUERY_PROMPT, DOCUMENT_PROMPTS = "query", ("document", "passage", "corpus")  # sentence-transformers' names


@dataclass(frozen=True, slots=True)
class Embedding:
    """A text as a vector."""

    vector: Vector
    num_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Relevance:
    """How well one document fits the query: a cross-encoder's sigmoid in 0 … 1, or its logit where the model's files ask for that;
    else a cosine in -1 … 1."""

    index: int  # of the document as it was given
    score: float
    num_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class PooledRequests:
    """Requests to submit together, checked as far as the model's kind goes."""

    prompts: list[Sequence[int]]
    params: list[SamplingParams]


def embedding_requests(
    worker: EngineWorker, texts: Sequence[Prompt], params: PoolingParams
) -> PooledRequests:
    """The requests that embed these texts. Tokenizes: not for an event loop, where texts are long.

    Raises:
        InvalidRequestError, PromptTooLongError: the model has no embeddings, does not pool so, or a text is too long.
    """
    worker.pooling.require_embeddings()
    sampling = SamplingParams(max_tokens=0, pooling=Pooling(worker.pooling.kind_for(params)))
    limit, prompt = _limit(worker), worker.pooling.prompt_for(params)
    prompts = [
        _ids_of(worker, prompt + text if isinstance(text, str) else text, params, limit) for text in texts
    ]
    return PooledRequests(prompts, [sampling] * len(prompts))


def embeddings_of(
    worker: EngineWorker, completions: Sequence[Completion], params: PoolingParams
) -> list[Embedding]:
    """What such requests brought, in their order.

    Raises:
        StepFailedError: one of them did not come to its end.
        InvalidRequestError: more dimensions than the model has.
    """
    return [
        Embedding(finish(_pooled(each), params, worker.pooling), each.num_prompt_tokens)
        for each in completions
    ]


def pair_requests(
    worker: EngineWorker, pairs: Sequence[tuple[str, str]], params: PoolingParams
) -> PooledRequests:
    """The requests that rate these pairs. A query that stands in many pairs is embedded once.

    Raises:
        InvalidRequestError, PromptTooLongError: the model rates nothing, or a pair is too long.
    """
    worker.pooling.require_scores()
    if worker.pooling.task != SCORE:
        return embedding_requests(worker, _texts_of(pairs), params)
    prompts: list[Sequence[int]] = []
    sampling: list[SamplingParams] = []
    limit = _limit(worker)
    for first, second in pairs:
        encoded = _tokenizer(worker).encode_texts(first, second, _most(params, limit))
        _check_length(encoded.ids, limit)
        prompts.append(encoded.ids)
        sampling.append(SamplingParams(max_tokens=0, pooling=Pooling(SCORE, encoded.second_segment)))
    return PooledRequests(prompts, sampling)


def relevances_of(
    worker: EngineWorker,
    pairs: Sequence[tuple[str, str]],
    completions: Sequence[Completion],
    params: PoolingParams,
) -> list[Relevance]:
    """What such requests brought: one for each pair, in their order. Raises StepFailedError."""
    if worker.pooling.task == SCORE:
        logits = [float(_pooled(each)[0]) for each in completions]
        counts = [each.num_prompt_tokens for each in completions]
        return [
            Relevance(i, _sigmoid(z) if worker.pooling.has_sigmoid else z, count)
            for i, (z, count) in enumerate(zip(logits, counts, strict=True))
        ]
    embedded = dict(zip(_texts_of(pairs), embeddings_of(worker, completions, params), strict=True))
    found = []
    for i, (first, second) in enumerate(pairs):
        a, b = embedded[first], embedded[second]
        found.append(Relevance(i, cosine(a.vector, b.vector), a.num_prompt_tokens + b.num_prompt_tokens))
    return found


def embed(
    worker: EngineWorker,
    texts: Sequence[Prompt],
    params: PoolingParams | None = None,
    *,
    lora: str | None = None,
    use_tqdm: bool = False,
) -> list[Embedding]:
    """As `LLM.embed`."""
    asked = params or PoolingParams()
    completions = _run(worker, embedding_requests(worker, texts, asked), lora, use_tqdm)
    return embeddings_of(worker, completions, asked)


def rerank(
    worker: EngineWorker,
    query: str,
    documents: Sequence[str],
    params: PoolingParams | None = None,
    *,
    use_tqdm: bool = False,
) -> list[Relevance]:
    """As `LLM.rerank`."""
    asked, pairs = params or PoolingParams(), search_pairs(worker, query, documents)
    completions = _run(worker, pair_requests(worker, pairs, asked), None, use_tqdm)
    return ranked(relevances_of(worker, pairs, completions, asked))


def search_pairs(worker: EngineWorker, query: str, documents: Sequence[str]) -> list[tuple[str, str]]:
    """The query with each document; for embeddings, each behind the prompt that the model was trained with, where it has one."""
    if worker.pooling.task != SCORE:
        prompts = worker.pooling.prompts
        query = prompts.get(QUERY_PROMPT, "") + query
        before = next((prompts[name] for name in DOCUMENT_PROMPTS if name in prompts), "")
        documents = [before + document for document in documents]
    return [(query, document) for document in documents]


def ranked(relevances: Sequence[Relevance]) -> list[Relevance]:
    """The best first; of equals the one that was given first."""
    return sorted(relevances, key=lambda each: (-each.score, each.index))


def cosine(a: Vector, b: Vector) -> float:
    """Of the angle between two vectors; 0 where one has no length."""
    lengths = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
    return float(a @ b) / lengths if lengths else 0.0


def _run(
    worker: EngineWorker, requests: PooledRequests, lora: str | None, use_tqdm: bool
) -> list[Completion]:
    streams = worker.submit_all(requests.prompts, requests.params, loras=[lora] * len(requests.prompts))
    return finished(streams, use_tqdm)


def _texts_of(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Every text of the pairs, once."""
    return list(dict.fromkeys(text for pair in pairs for text in pair))


def _ids_of(worker: EngineWorker, text: Prompt, params: PoolingParams, limit: int) -> Sequence[int]:
    most = _most(params, limit)
    if isinstance(text, str):
        text = text.lower() if worker.pooling.lower_case else text
        ids: Sequence[int] = _tokenizer(worker).encode_texts(text, None, most).ids
    else:
        ids = text if most is None else text[:most]
    _check_length(ids, limit)
    return ids


def _most(params: PoolingParams, limit: int) -> int | None:
    """Tokens that a text is cut to; None: it must fit."""
    cut = params.truncate_prompt_tokens
    return None if cut is None else limit if cut == -1 else min(cut, limit)


def _limit(worker: EngineWorker) -> int:
    most = worker.config.max_model_len
    assert most is not None, "the config is not resolved"
    return min(most, worker.pooling.max_length or most)


def _check_length(ids: Sequence[int], limit: int) -> None:
    if len(ids) > limit:
        raise PromptTooLongError(
            f"a text has {len(ids)} tokens, the model reads {limit}", value=len(ids), limit=limit, param="input",
            remedy="Shorten it, or send truncate_prompt_tokens=-1 to have its end cut off.",
        )  # fmt: skip


def _tokenizer(worker: EngineWorker) -> TokenizerLike:
    if worker.tokenizer is None:
        raise InvalidRequestError(
            "this engine has no tokenizer", remedy="Give token ids instead of text.", param="input"
        )
    return worker.tokenizer


def _pooled(completion: Completion) -> Vector:
    if completion.finish_reason is not FinishReason.LENGTH or completion.pooled is None:
        raise StepFailedError(completion.error or "embedding failed", value=completion.request_id)
    return completion.pooled


def _sigmoid(logit: float) -> float:
    """1 / (1 + e⁻ˣ), without an overflow."""
    e = math.exp(-abs(logit))
    return (1.0 if logit >= 0 else e) / (1.0 + e)
