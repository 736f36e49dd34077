"""`quire chat`: one question or a conversation in the terminal, with a running server or an engine of its own.

Without --url it attaches to the app of this HOME_DIR if that answers, so that no second copy of a model is loaded by
accident; a model named by --model is loaded here, where no other process of this HOME_DIR has one.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import httpx

from workbench.device_lock import DeviceLock
from workbench.errors import ApiError, NotReadyError, ServerUnreachableError, WorkbenchError
from workbench.host import EngineHost, HostPhase, fake_worker
from workbench.model_card import check_model
from workbench.run_state import RunState
from workbench.settings import Settings, prepare_home

_TIMEOUT = httpx.Timeout(600.0, connect=5.0)
Messages = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How answers are sampled."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


@dataclass(slots=True)
class Answer:
    """One answer's facts, filled while it is read."""

    text: str = ""
    finish_reason: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    ttft_ms: float | None = None
    e2e_ms: float | None = None
    started: float = field(default_factory=time.monotonic)
    has_reasoned: bool = False

    def took(self, text: str, reasoning: str = "") -> str:
        """Keep a piece of the answer; what a reader is shown of it: reasoning first, apart, and no part of the text."""
        if self.ttft_ms is None and (text or reasoning):
            self.ttft_ms = (time.monotonic() - self.started) * 1e3
        gap = "\n\n" if text and not self.text and (self.has_reasoned or reasoning) else ""
        self.has_reasoned = self.has_reasoned or bool(reasoning)
        self.text += text
        return f"{reasoning}{gap}{text}"

    def as_dict(self) -> dict[str, Any]:
        names = (
            "text",
            "finish_reason",
            "prompt_tokens",
            "cached_tokens",
            "completion_tokens",
            "ttft_ms",
            "e2e_ms",
        )
        return {name: getattr(self, name) for name in names}


class ChatPartner(Protocol):
    """Whoever answers."""

    @property
    def name(self) -> str: ...

    def ask(self, messages: Messages, options: ChatOptions, answer: Answer) -> Iterator[str]:
        """Pieces of the answer as they come; `answer` has the facts at the end."""
        ...

    def close(self) -> None: ...


class ServerPartner:
    """An OpenAI-compatible server."""

    def __init__(self, url: str, model: str | None = None) -> None:
        self._base = url.rstrip("/").removesuffix("/v1")
        if not self._base.startswith(("http://", "https://")):
            raise ServerUnreachableError(
                f"{url!r} is no address",
                value=url,
                param="--url",
                remedy="Use one like http://127.0.0.1:8501.",
            )
        self._client = httpx.Client(timeout=_TIMEOUT)
        self.name = model or self._first_model()

    def ask(self, messages: Messages, options: ChatOptions, answer: Answer) -> Iterator[str]:
        body = {
            "model": self.name,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": options.max_tokens,
            "temperature": options.temperature,
            "top_p": options.top_p,
            **({} if options.seed is None else {"seed": options.seed}),
        }
        try:
            with self._client.stream("POST", f"{self._base}/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise _server_error(response)
                yield from _read_events(response.iter_lines(), answer)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        answer.e2e_ms = (time.monotonic() - answer.started) * 1e3

    def close(self) -> None:
        self._client.close()

    def _first_model(self) -> str:
        try:
            response = self._client.get(f"{self._base}/v1/models")
            name: str = response.raise_for_status().json()["data"][0]["id"]
        except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
            raise self._unreachable(error) from error
        return name

    def _unreachable(self, error: Exception) -> ServerUnreachableError:
        return ServerUnreachableError(
            f"no server with a model answers at {self._base} ({type(error).__name__}: {error})",
            value=self._base, param="--url", remedy="Start one with `quire up`, or leave --url out.",
        )  # fmt: skip


class EnginePartner:
    """An engine in this process."""

    def __init__(self, settings: Settings) -> None:
        if not settings.fake:
            check_model(settings.model_path)
        prepare_home(settings)
        self._lock = DeviceLock(settings.run_dir, settings.device_id).acquire()
        self._host = EngineHost(settings.engine_config(), factory=fake_worker if settings.fake else None)
        self._host.start()
        state = self._host.wait()
        if state.phase is not HostPhase.READY:
            self.close()
            raise state.error or NotReadyError(state.message)
        self.name = self._host.models()[0].id

    def ask(self, messages: Messages, options: ChatOptions, answer: Answer) -> Iterator[str]:
        from engine.sampling_params import SamplingParams
        from workbench.chat_output import gather, output_syntax

        worker = self._host.worker()
        if worker.tokenizer is None:
            raise ApiError("this model has no tokenizer", remedy="Add tokenizer.json to its folder.")
        params = SamplingParams(
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=options.seed,
        )
        prompt = worker.tokenizer.apply_chat_template(messages)
        syntax = output_syntax(worker.tokenizer, prompt, reasoning_parser=worker.config.reasoning_parser)
        parser = syntax.parser()
        stream = worker.submit(
            prompt, params.with_(skip_special_tokens=False) if syntax.shows_special_tokens else params
        )
        for delta in stream:
            pieces = parser.push(delta.text or "")
            if delta.finish_reason is not None:
                pieces += parser.finish()
            found = gather(pieces)
            yield answer.took(found.content, found.reasoning)
        done = stream.completion
        assert done is not None
        answer.finish_reason, answer.completion_tokens = done.finish_reason.value, done.num_output_tokens
        answer.prompt_tokens, answer.cached_tokens = done.num_prompt_tokens, done.num_cached_tokens
        answer.ttft_ms, answer.e2e_ms = done.ttft_ms, done.e2e_ms
        if done.error:
            raise WorkbenchError(f"the answer failed: {done.error}")

    def close(self) -> None:
        self._host.close()
        self._lock.release()


def run_chat(
    settings: Settings,
    options: ChatOptions,
    *,
    question: str | None,
    url: str | None,
    model: str | None,
    system: str | None,
    as_json: bool,
) -> int:
    """Answer one question, or talk until the input ends; the exit code."""
    from engine.sampling_params import SamplingParams

    SamplingParams(  # the values are checked before a model is loaded
        max_tokens=options.max_tokens, temperature=options.temperature, top_p=options.top_p, seed=options.seed
    )
    partner = _partner(settings, url, model)
    messages: Messages = [{"role": "system", "content": system}] if system else []
    try:
        if question is not None:
            _turn(partner, messages, options, question, as_json)
        else:
            _converse(partner, messages, options, as_json)
    finally:
        partner.close()
    return 0


def _partner(settings: Settings, url: str | None, model: str | None) -> ChatPartner:
    if url is not None:
        return ServerPartner(url, model)
    if model is None and settings.model is None and not settings.fake:
        app = RunState(settings.run_dir).read()
        if app is not None:
            try:
                return ServerPartner(app.url)
            except ServerUnreachableError:
                pass  # it is starting or stopping: answer from here
    return EnginePartner(settings)


def _converse(partner: ChatPartner, messages: Messages, options: ChatOptions, as_json: bool) -> None:
    interactive = sys.stdin.isatty()
    if interactive:
        print(f"Talking to {partner.name}. An empty line or Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            question = input("> " if interactive else "")
        except EOFError:
            return
        if not question.strip():
            return
        _turn(partner, messages, options, question, as_json)


def _turn(
    partner: ChatPartner, messages: Messages, options: ChatOptions, question: str, as_json: bool
) -> None:
    messages.append({"role": "user", "content": question})
    answer = Answer()
    out = sys.stderr if as_json else sys.stdout
    for text in partner.ask(messages, options, answer):
        print(text, end="", file=out, flush=True)
    print(file=out, flush=True)
    messages.append({"role": "assistant", "content": answer.text})
    if as_json:
        print(json.dumps({"model": partner.name, **answer.as_dict()}), flush=True)


def _read_events(lines: Iterator[str], answer: Answer) -> Iterator[str]:
    for line in lines:
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        event = json.loads(line[len("data: ") :])
        if "error" in event:
            raise WorkbenchError(f"the answer failed: {event['error'].get('message')}")
        if usage := event.get("usage"):
            answer.prompt_tokens, answer.completion_tokens = (
                usage["prompt_tokens"],
                usage["completion_tokens"],
            )
            answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        for choice in event.get("choices", ()):
            delta = choice["delta"]
            reasoning = delta.get("reasoning") or delta.get("reasoning_content") or ""
            answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
            yield answer.took(delta.get("content") or "", reasoning)


def _server_error(response: httpx.Response) -> WorkbenchError:
    try:
        error = response.json()["error"]
        message, code, param = error["message"], error.get("code"), error.get("param")
    except (ValueError, LookupError, TypeError):
        message, code, param = response.text[:200], None, None
    kind = NotReadyError if response.status_code >= 500 else ApiError
    return kind(message, value=code, param=param)
