"""Kinds of OpenAI-compatible endpoints: what each is called, what it can do, and which sampling parameters it takes.

What is not listed here is refused by name before anything is sent: some servers drop in silence what they do not know, and an
answer that was sampled otherwise than asked for is worse than none.

Sources, all read in November 2026: docs.vllm.ai "OpenAI-Compatible Server"; docs.ollama.com/api/openai-compatibility;
llama.cpp tools/server/README.md; lmstudio.ai/docs "OpenAI compatibility"; platform.openai.com "API reference";
learn.microsoft.com "Azure OpenAI REST API"; MLflow 3.17's ``server/gateway_api.py`` and ``types/chat.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from engine.sampling_params import SamplingParams

QUIRE, VLLM, OLLAMA, LLAMA_CPP = "quire", "vllm", "ollama", "llama.cpp"
LM_STUDIO, AZURE, MLFLOW, OPENAI = "lmstudio", "azure", "mlflow-gateway", "openai"

# What clients of every kind decide for themselves, or what changes no token.
_OF_THE_CLIENT = {"n", "skip_special_tokens", "max_tokens", "logprobs"}
_COMMON = {"temperature", "top_p", "stop", "seed", "presence_penalty", "frequency_penalty"}
_OURS = _COMMON | {
    "top_k", "min_p", "typical_p", "repetition_penalty", "logit_bias", "bad_words", "allowed_token_ids", "stop_token_ids",
    "ignore_eos", "min_tokens", "structured_outputs",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Kind:
    """What servers of one kind can do."""

    title: str
    params: frozenset[str]  # fields of SamplingParams
    abilities: frozenset[str]  # chat, completions, logprobs, tools, embeddings, rerank, score, tokenize
    key_header: str = "authorization"
    v1_path: str = "/v1"  # of the OpenAI-compatible API, below the server's address

    def can(self, ability: str) -> bool:
        return ability in self.abilities


def _kind(title: str, params: set[str], abilities: str, **more: str) -> Kind:
    return Kind(title, frozenset(params | _OF_THE_CLIENT), frozenset(abilities.split()), **more)


_LOCAL = "chat completions logprobs tools embeddings"
KINDS: Mapping[str, Kind] = {
    QUIRE: _kind("Quire", _OURS, f"{_LOCAL} rerank score tokenize"),
    VLLM: _kind("vLLM", _OURS - {"typical_p"}, f"{_LOCAL} rerank score tokenize"),
    OLLAMA: _kind("Ollama", _COMMON, _LOCAL),
    LLAMA_CPP: _kind(
        "llama.cpp", _COMMON | {"top_k", "min_p", "typical_p", "logit_bias", "ignore_eos"}, f"{_LOCAL} rerank tokenize"
    ),
    LM_STUDIO: _kind("LM Studio", _COMMON | {"top_k", "logit_bias"}, "chat completions tools embeddings"),
    AZURE: _kind(
        "Azure OpenAI", _COMMON | {"logit_bias"}, "chat logprobs tools embeddings", key_header="api-key",
        v1_path="/openai/v1",
    ),
    MLFLOW: _kind("MLflow AI Gateway", (_COMMON - {"seed"}) | {"top_k"}, "chat tools", v1_path="/gateway/mlflow/v1"),
    OPENAI: _kind("OpenAI-compatible", _COMMON | {"logit_bias"}, "chat completions logprobs tools embeddings"),
}  # fmt: skip


def unsupported(kind: str, params: SamplingParams) -> list[str]:
    """The parameters that differ from their default and that this kind does not take, in the order of the fields.

    A greedy request needs no seed.
    """
    default, takes = SamplingParams(), KINDS[kind].params
    if params.temperature == 0:
        takes |= {"seed"}
    return [
        field.name
        for field in fields(SamplingParams)
        if field.name not in takes and getattr(params, field.name) != getattr(default, field.name)
    ]
