"""OpenAIBackend: any OpenAI-compatible endpoint, ours on another machine, vLLM, or a hosted model.

It knows what the wire tells: text, finish reason, token counts, log-probabilities of chosen tokens, and times as this client sees
them. Token ids are not on that wire: they are -1, so that counts are true and a comparison of ids is never by accident equal
to a real one. Scoring, loading and records are refused by name.

Boundary: the public protocol; nothing of Quire's own routes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import httpx

from engine.embedding import Embedding, Relevance
from engine.llm import Score
from engine.plan import TokenLogprobs
from engine.pooling import PoolingParams
from engine.records import Completion, EngineStats
from engine.request import FinishReason
from engine.sampling_params import SamplingParams
from engine.structured_outputs import KINDS, StructuredOutputsParams
from engine.token_kl import TokenKL
from workbench.backends.protocol import (
    DEFAULT_CONCURRENCY,
    BackendUnsupportedError,
    Message,
    Prompt,
    Records,
    as_conversations,
    as_prompts,
    check_concurrency,
    one_each,
)
from workbench.backends.window import in_window
from workbench.backends.wire import HttpBackend, error_of, lost
from workbench.errors import ServerUnreachableError

UNKNOWN_TOKEN = -1
_TIMEOUT = httpx.Timeout(600.0, connect=10.0)
_FINISH = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH, "tool_calls": FinishReason.STOP}
_OPENAI_FIELDS = ("temperature", "top_p", "seed", "max_tokens")
_EXTRA_FIELDS = (  # sent only where they say something
    "top_k", "min_p", "typical_p", "ignore_eos", "min_tokens", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "logit_bias", "bad_words", "allowed_token_ids",
)  # fmt: skip


class OpenAIBackend(HttpBackend):
    """An endpoint such as ``http://host:8000`` or ``https://api.example.com/v1``.

    Raises:
        ServerUnreachableError: no such address, or it names no model and none was given.
    """

    def __init__(self, url: str, api_key: str | None = None, model: str | None = None) -> None:
        if not url.startswith(("http://", "https://")):
            raise ServerUnreachableError(
                f"{url!r} is no address", value=url, param="url", remedy="Use one like http://127.0.0.1:8501/v1."
            )  # fmt: skip
        base = url.rstrip("/").removesuffix("/v1") + "/v1"
        super().__init__(
            f"openai {base}", base, {"authorization": f"Bearer {api_key}"} if api_key else {}, _TIMEOUT
        )
        self._model = model
        if model is None:
            try:
                self._model = self.models()[0]
            except (httpx.HTTPError, LookupError) as error:
                self.close()
                raise ServerUnreachableError(
                    f"{self.url} names no model", value=self.url, param="model", remedy="Give model=…."
                ) from error
            except BaseException:
                self.close()
                raise

    def models(self) -> list[str]:
        try:
            response = self._client.get("/models")
        except httpx.HTTPError as error:
            raise lost(self.name, error) from error
        if response.status_code != 200:
            raise error_of(response, self.name)
        names = [str(each["id"]) for each in response.json()["data"]]
        return sorted(names, key=lambda name: name != self._model)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        model: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        max_concurrency: int = DEFAULT_CONCURRENCY,
    ) -> list[Completion]:
        many = as_conversations(messages)
        calls = []
        for chat, each in zip(many, one_each(params, len(many)), strict=True):
            body = request_body(model or self._model, each)
            body["messages"] = [dict(message) for message in chat]
            if tools:
                body["tools"] = [dict(tool) for tool in tools]
            if each.logprobs is not None:
                body |= {"logprobs": True, "top_logprobs": each.logprobs}
            calls.append(partial(self._stream, "/chat/completions", body, each))
        return in_window(calls, check_concurrency(max_concurrency), self.hang_up)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        model: str | None = None,
        max_concurrency: int = DEFAULT_CONCURRENCY,
    ) -> list[Completion]:
        many = as_prompts(prompts)
        calls = []
        for prompt, each in zip(many, one_each(params, len(many)), strict=True):
            body = request_body(model or self._model, each)
            body["prompt"] = prompt if isinstance(prompt, str) else list(prompt)
            if each.logprobs is not None:
                body["logprobs"] = each.logprobs
            calls.append(partial(self._stream, "/completions", body, each))
        return in_window(calls, check_concurrency(max_concurrency), self.hang_up)

    def score(self, texts: Prompt | Sequence[Prompt], *, model: str | None = None) -> list[Score]:
        self._refuse("score given texts")

    def embed(
        self,
        texts: Prompt | Sequence[Prompt],
        params: PoolingParams | None = None,
        *,
        model: str | None = None,
    ) -> list[Embedding]:
        self._refuse("embed texts")

    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        params: PoolingParams | None = None,
        *,
        model: str | None = None,
    ) -> list[Relevance]:
        self._refuse("rerank documents")

    def token_kl(
        self, texts: Prompt | Sequence[Prompt], *, other: str, model: str | None = None
    ) -> list[TokenKL]:
        self._refuse("compare whole distributions")

    def load(self, ref: str, *, deterministic: bool = False) -> str:
        """The id of a model that the endpoint serves already. Raises BackendUnsupportedError for any other."""
        if deterministic or ref not in self.models():
            self._refuse(f"load {ref!r}{' deterministically' if deterministic else ''}")
        return ref

    def unload(self, model: str) -> None:
        self._refuse("unload a model")

    def stats(self, model: str | None = None) -> EngineStats:
        self._refuse("tell an engine's statistics")

    def records(self, model: str | None = None, since_ns: int | None = None) -> Records:
        self._refuse("tell an engine's records")

    # ── wire ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _stream(self, path: str, body: dict[str, Any], params: SamplingParams) -> Completion:
        answer = _Answer(params)
        try:
            with self._client.stream("POST", path, json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise error_of(response, self.name)
                answer.read(response.iter_lines())
        except (httpx.HTTPError, RuntimeError) as error:
            raise lost(self.name, error) from error
        return answer.completion()

    def _refuse(self, what: str) -> NoReturn:
        raise BackendUnsupportedError(
            f"{self.name} cannot {what}", value=self.url,
            remedy="Use workbench.connect(), which reaches an engine of this machine.",
        )  # fmt: skip


def request_body(model: str | None, params: SamplingParams) -> dict[str, Any]:
    """A streamed request's fields, those of the prompt and log-probabilities left out: their names differ by endpoint."""
    default = SamplingParams(max_tokens=params.max_tokens)
    body: dict[str, Any] = {
        "model": model,
        "stream": True,
        "stream_options": {"include_usage": True},
        **{name: value for name in _OPENAI_FIELDS if (value := getattr(params, name)) is not None},
        **{
            name: value
            for name in _EXTRA_FIELDS
            if (value := getattr(params, name)) != getattr(default, name)
        },
    }
    if params.stop:
        body["stop"] = list(params.stop)
    if params.stop_token_ids:
        body["stop_token_ids"] = list(params.stop_token_ids)
    if params.structured_outputs is not None:
        body["structured_outputs"] = _structured(params.structured_outputs)
    return body


def _structured(asked: StructuredOutputsParams) -> dict[str, Any]:
    """In vLLM's names, which our own API reads too."""
    values = {name: value for name in KINDS if (value := getattr(asked, name)) not in (None, False)}
    return values if asked.any_whitespace else {**values, "disable_any_whitespace": True}


@dataclass(slots=True)
class _Answer:
    """One streamed answer, gathered."""

    params: SamplingParams
    id: str = ""
    texts: list[str] = field(default_factory=list)
    calls: dict[int, dict[str, str]] = field(default_factory=dict)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    sent: float = field(default_factory=time.monotonic)
    first: float | None = None
    last: float = 0.0
    pieces: int = 0

    def read(self, lines: Iterator[str]) -> None:
        for line in lines:
            if not line.startswith("data:") or line.endswith("[DONE]"):
                continue
            event = json.loads(line[5:])
            self.id = event.get("id") or self.id
            self.usage = event.get("usage") or self.usage
            if "error" in event:
                self.error = str(event["error"].get("message"))
            for choice in event.get("choices", ()):
                self._take(choice)
        self.last = self.last or time.monotonic()

    def _take(self, choice: dict[str, Any]) -> None:
        delta = choice.get("delta") or {}
        text = delta.get("content") or choice.get("text") or ""
        for call in delta.get("tool_calls") or ():
            kept = self.calls.setdefault(call.get("index", 0), {"name": "", "arguments": ""})
            function = call.get("function") or {}
            kept["name"] += function.get("name") or ""
            kept["arguments"] += function.get("arguments") or ""
        if text or delta.get("tool_calls") or delta.get("reasoning") or delta.get("reasoning_content"):
            self.last = time.monotonic()
            self.first = self.first or self.last
            self.pieces += 1
        self.texts.append(text)
        self.logprobs += _logprobs(choice.get("logprobs"))
        if choice.get("finish_reason"):
            self.finish_reason = _FINISH.get(choice["finish_reason"], FinishReason.STOP)
            self.stop_reason = choice.get("stop_reason")

    def completion(self) -> Completion:
        num_output = int(self.usage.get("completion_tokens") or len(self.logprobs) or self.pieces)
        ttft = tpot = None
        if self.first is not None:
            ttft = (self.first - self.sent) * 1e3
            if num_output > 1:
                tpot = (self.last - self.first) * 1e3 / (num_output - 1)
        calls = [
            json.dumps(call, ensure_ascii=False, separators=(",", ":"))
            for _, call in sorted(self.calls.items())
        ]
        failed = self.error is not None or self.finish_reason is None
        return Completion(
            request_id=self.id,
            prompt_token_ids=(UNKNOWN_TOKEN,) * int(self.usage.get("prompt_tokens") or 0),
            token_ids=(UNKNOWN_TOKEN,) * num_output,
            text="".join(self.texts) + "\n".join(calls),
            finish_reason=FinishReason.ERROR if failed else self.finish_reason or FinishReason.ERROR,
            stop_reason=self.stop_reason,
            logprobs=tuple(self.logprobs),
            prompt_logprobs=(),
            num_cached_tokens=int((self.usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0),
            seed=self.params.seed or 0,
            ttft_ms=ttft,
            tpot_ms=tpot,
            e2e_ms=(time.monotonic() - self.sent) * 1e3,
            error=self.error or ("the stream ended without a finish reason" if failed else None),
        )


def _logprobs(block: dict[str, Any] | None) -> list[TokenLogprobs]:
    if not block:
        return []
    if block.get("content"):
        return [TokenLogprobs(UNKNOWN_TOKEN, float(entry["logprob"]), 0) for entry in block["content"]]
    return [
        TokenLogprobs(UNKNOWN_TOKEN, float(p), 0) for p in block.get("token_logprobs") or () if p is not None
    ]
