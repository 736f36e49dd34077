"""The JSON of the internal routes (``/quire/*``): engine values as plain objects, and back, without loss.

Both sides import this module, so that what the app writes is what `AppBackend` reads. Floats keep their bits (JSON's shortest
form); an infinity is written as the text "inf" or "-inf".

    POST /quire/chat      {"model", "messages": [[…], …], "params": [{…}, …], "tools": […]|null}  -> {"completions": [{…}, …]}
    POST /quire/generate  {"model", "prompts": ["…" | [ids], …], "params": [{…}, …]}              -> {"completions": [{…}, …]}
    POST /quire/score     {"model", "texts": ["…" | [ids], …]}                                    -> {"scores": [{…}, …]}
    POST /quire/token_kl  {"model", "other", "texts": ["…" | [ids], …]}                           -> {"divergences": [{…}, …]}
    POST /quire/embed     {"model", "texts": ["…" | [ids], …], "params"}                          -> {"embeddings": [{…}, …]}
    POST /quire/rerank    {"model", "query", "documents": ["…", …], "params"}                     -> {"relevances": [{…}, …]}
    POST /quire/load      {"ref", "deterministic"}                                                -> {"id"}
    POST /quire/unload    {"id"}                                                                  -> {}
    GET  /quire/residents                                                                         -> {"residents": [{…}, …]}
    GET  /quire/stats?model=                                                                      -> {"stats": {…}}
    GET  /quire/records?model=&since_ns=                                             -> {"requests": [{…}], "steps": [{…}]}

`params` holds the fields of SamplingParams; those that are left out have their default. Errors have the shape of /v1, with
``value``, ``limit`` and ``remedy`` beside ``message``, ``param`` and ``code``.

Boundary: shapes. No HTTP here, no engine is called.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from engine.embedding import Embedding, Relevance
from engine.errors import InvalidParamsError
from engine.llm import Score
from engine.plan import TokenLogprobs
from engine.pooling import PoolingParams
from engine.records import Completion, EngineStats, MemoryLedger, RequestRecord, StepRecord
from engine.request import FinishReason
from engine.sampling_params import ALL_LOGPROBS, MAX_LOGPROBS, SamplingParams
from engine.structured_outputs import StructuredOutputsParams
from engine.token_kl import TokenKL


@dataclass(frozen=True, slots=True)
class StepSummary:
    """A StepRecord without its rows and blocks: what benchmarks and checks read. Times are ``time.monotonic_ns()``."""

    step_id: int
    started_ns: int
    ended_ns: int
    schedule_ms: float
    prepare_ms: float
    forward_ms: float
    sample_ms: float
    num_prefill_tokens: int
    num_decode_tokens: int
    num_waiting: int
    num_running: int
    num_free_blocks: int
    graph_size: int
    bytes_needed: int
    flops_needed: int
    weight_bytes: int = 0
    attention_flops: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Records:
    """What an engine remembers of finished requests and of steps, oldest first."""

    requests: list[RequestRecord]
    steps: list[StepSummary]


# ── params ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

_PARAMS = {field.name for field in fields(SamplingParams)}


def params_to_json(params: SamplingParams) -> dict[str, Any]:
    return asdict(params)


def params_from_json(values: Mapping[str, Any]) -> SamplingParams:
    """Raises InvalidParamsError: an unknown name, or a value out of its range."""
    for name in values:
        if name not in _PARAMS:
            raise InvalidParamsError(
                f"unknown sampling parameter {name!r}", value=name, limit=sorted(_PARAMS), param=str(name)
            )
    given = dict(values)
    if isinstance(structured := given.get("structured_outputs"), Mapping):
        given["structured_outputs"] = StructuredOutputsParams.from_dict(dict(structured))
    params = SamplingParams(**given)
    if params.prompt_logprobs == ALL_LOGPROBS:
        raise InvalidParamsError(
            "whole rows of logits do not leave the process: prompt_logprobs=-1", value=ALL_LOGPROBS, limit=MAX_LOGPROBS,
            param="prompt_logprobs", remedy="Ask for at most as many as the limit says.",
        )  # fmt: skip
    return params


# ── completions ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def completion_to_json(completion: Completion) -> dict[str, Any]:
    values = {field.name: getattr(completion, field.name) for field in fields(Completion)}
    return {
        **values,
        "prompt_token_ids": list(completion.prompt_token_ids),
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason.value,
        "logprobs": [_logprobs_to_json(entry) for entry in completion.logprobs],
        "prompt_logprobs": [_logprobs_to_json(entry) for entry in completion.prompt_logprobs],
    }


def completion_from_json(values: Mapping[str, Any]) -> Completion:
    return Completion(
        **{
            **values,
            "prompt_token_ids": tuple(values["prompt_token_ids"]),
            "token_ids": tuple(values["token_ids"]),
            "finish_reason": FinishReason(values["finish_reason"]),
            "logprobs": tuple(_logprobs_from_json(entry) for entry in values["logprobs"]),
            "prompt_logprobs": tuple(_logprobs_from_json(entry) for entry in values["prompt_logprobs"]),
        }
    )


def _logprobs_to_json(entry: TokenLogprobs) -> list[Any]:
    """[token id, logprob, rank, ids of the most likely, their logprobs]"""
    return [
        entry.token_id, _out(entry.logprob), entry.rank, list(entry.top_ids), [_out(p) for p in entry.top_logprobs],
    ]  # fmt: skip


def _logprobs_from_json(entry: Sequence[Any]) -> TokenLogprobs:
    token_id, logprob, rank, top_ids, top_logprobs = entry
    return TokenLogprobs(
        token_id, float(logprob), rank, tuple(top_ids), tuple(float(p) for p in top_logprobs)
    )


def score_to_json(score: Score) -> dict[str, Any]:
    return {
        "token_ids": list(score.token_ids),
        "logprobs": [_out(p) for p in score.logprobs],
        "total_logprob": _out(score.total_logprob),
        "perplexity": _out(score.perplexity),
    }


def score_from_json(values: Mapping[str, Any]) -> Score:
    return Score(
        tuple(values["token_ids"]),
        tuple(float(p) for p in values["logprobs"]),
        float(values["total_logprob"]),
        float(values["perplexity"]),
    )


def token_kl_to_json(divergence: TokenKL) -> dict[str, Any]:
    return {
        "token_ids": list(divergence.token_ids),
        "kl": [_out(p) for p in divergence.kl],
        "logprobs": [_out(p) for p in divergence.logprobs],
        "other_logprobs": [_out(p) for p in divergence.other_logprobs],
        "same_top": list(divergence.same_top),
    }


def token_kl_from_json(values: Mapping[str, Any]) -> TokenKL:
    kl, own, other = (tuple(map(float, values[name])) for name in ("kl", "logprobs", "other_logprobs"))
    return TokenKL(tuple(values["token_ids"]), kl, own, other, tuple(values["same_top"]))


def pooling_from_json(values: Mapping[str, Any]) -> PoolingParams:
    """Raises InvalidParamsError: an unknown name, or a value out of its range."""
    known = {field.name for field in fields(PoolingParams)}
    for name in values:
        if name not in known:
            raise InvalidParamsError(
                f"unknown pooling parameter {name!r}", value=name, limit=sorted(known), param=str(name)
            )
    return PoolingParams(**values)


def embedding_to_json(embedding: Embedding) -> dict[str, Any]:
    return {"vector": embedding.vector.tolist(), "num_prompt_tokens": embedding.num_prompt_tokens}


def embedding_from_json(values: Mapping[str, Any]) -> Embedding:
    return Embedding(np.array(values["vector"], np.float64), values["num_prompt_tokens"])


def relevance_to_json(relevance: Relevance) -> dict[str, Any]:
    return asdict(relevance)


def relevance_from_json(values: Mapping[str, Any]) -> Relevance:
    return Relevance(**values)


# ── statistics and records ──────────────────────────────────────────────────────────────────────────────────────────────


def stats_to_json(stats: EngineStats) -> dict[str, Any]:
    return asdict(stats)


def stats_from_json(values: Mapping[str, Any]) -> EngineStats:
    memory = values.get("memory")
    gains = {int(rows): gain for rows, gain in values.get("speculation_gains", {}).items()}
    return EngineStats(
        **{**values, "memory": MemoryLedger(**memory) if memory else None, "speculation_gains": gains}
    )


def step_summary(record: StepRecord) -> StepSummary:
    return StepSummary(**{field.name: getattr(record, field.name) for field in fields(StepSummary)})


def records_to_json(records: Records) -> dict[str, Any]:
    return {
        "requests": [
            {
                **{field.name: getattr(request, field.name) for field in fields(RequestRecord)},
                "finish_reason": request.finish_reason.value,
                "token_ns": list(request.token_ns),
            }
            for request in records.requests
        ],
        "steps": [asdict(step) for step in records.steps],
    }


def records_from_json(values: Mapping[str, Any]) -> Records:
    requests = [
        RequestRecord(
            **{
                **request,
                "finish_reason": FinishReason(request["finish_reason"]),
                "token_ns": tuple(request["token_ns"]),
            }
        )
        for request in values["requests"]
    ]
    return Records(requests, [StepSummary(**step) for step in values["steps"]])


def _out(number: float) -> float | str:
    return number if math.isfinite(number) else str(number)  # "inf", "-inf", "nan": float() reads them back
