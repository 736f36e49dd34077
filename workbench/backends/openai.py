"""OpenAIBackend: any OpenAI-compatible endpoint, ours on another machine, vLLM, or a hosted model.

It knows what the wire tells: text, finish reason, token counts, log-probabilities of chosen tokens, and times as this client sees
them. Scoring, loading and records are refused by name. What certainly was not begun is asked again (`retries`); redirects are not
followed, so that a key never goes to another host than the one that was named.

Boundary: the public protocol; nothing of Quire's own routes. Endpoints with a name and a kind are `endpoint_backend`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn, TypeVar

import httpx

from engine.embedding import Embedding, Relevance
from engine.llm import Score
from engine.pooling import PoolingParams
from engine.records import Completion, EngineStats
from engine.sampling_params import SamplingParams
from engine.structured_outputs import KINDS, StructuredOutputsParams
from engine.token_kl import TokenKL
from workbench.backends.openai_answer import StreamedAnswer
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
from workbench.backends.retries import REFUSED, RefusedForNow, Retries, retry_after_s
from workbench.backends.window import in_window
from workbench.backends.wire import HttpBackend, error_of, lost
from workbench.errors import ServerUnreachableError

T = TypeVar("T")
_TIMEOUT = httpx.Timeout(600.0, connect=10.0)
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

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        model: str | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        retries: Retries | None = None,
    ) -> None:
        """`headers`: sent with every request, for servers that want their key elsewhere than as a bearer token."""
        if not url.startswith(("http://", "https://")):
            raise ServerUnreachableError(
                f"{url!r} is no address", value=url, param="url", remedy="Use one like http://127.0.0.1:8501/v1."
            )  # fmt: skip
        base = url.rstrip("/").removesuffix("/v1") + "/v1"
        key = {"authorization": f"Bearer {api_key}"} if api_key else {}
        super().__init__(f"openai {base}", base, {**key, **(headers or {})}, _TIMEOUT)
        self._retries = retries or Retries()
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
        answer = self._ask(lambda: self._client.get("/models"))
        names = [str(each["id"]) for each in answer["data"]]
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

    def _address(self, path: str, model: str | None) -> str:
        """Where `path` of the API is found for a model: below the base URL."""
        return path

    def _stream(self, path: str, body: dict[str, Any], params: SamplingParams) -> Completion:
        def send() -> StreamedAnswer:
            answer = StreamedAnswer(params)
            with self._client.stream("POST", self._address(path, body["model"]), json=body) as response:
                if response.status_code != 200:
                    response.read()
                    self._refused(response)
                answer.read(response.iter_lines())
            return answer

        return self._sent(send).completion()

    def _ask(self, send: Callable[[], httpx.Response]) -> dict[str, Any]:
        """The JSON object of an answer that is not streamed."""

        def sent() -> dict[str, Any]:
            response = send()
            if response.status_code != 200:
                self._refused(response)
            found: dict[str, Any] = response.json()
            return found

        return self._sent(sent)

    def _sent(self, send: Callable[[], T]) -> T:
        try:
            return self._retries.run(send)
        except (httpx.HTTPError, RuntimeError) as error:
            raise lost(self.name, error) from error

    def _refused(self, response: httpx.Response) -> NoReturn:
        error = error_of(response, self.name)
        if response.status_code in REFUSED:
            raise RefusedForNow(error, retry_after_s(response.headers))
        raise error

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
