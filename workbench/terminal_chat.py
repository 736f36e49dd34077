"""`quire chat`: one question or a conversation in the terminal, with a running server or an engine of its own.

Without --url it attaches to the app of this HOME_DIR if that answers, so that no second copy of a model is loaded by
accident; a model named by --model is loaded here, where no other process of this HOME_DIR has one.
"""

from __future__ import annotations

import json
import ssl
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import httpx

from workbench.access.client_key import authorization
from workbench.chat_request import ChatOptions, prepare
from workbench.device_lock import DeviceLock
from workbench.errors import ApiError, NotReadyError, ServerUnreachableError, WorkbenchError
from workbench.host import EngineHost, HostPhase, fake_worker
from workbench.model_card import check_model
from workbench.run_state import RunState
from workbench.settings import Settings, prepare_home

if TYPE_CHECKING:
    from workbench.chat_output import Piece

_TIMEOUT = httpx.Timeout(600.0, connect=5.0)
Messages = list[dict[str, Any]]


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
    calls: list[dict[str, str]] = field(default_factory=list)  # name and arguments of each tool call
    logprobs: list[dict[str, Any]] = field(default_factory=list)  # as OpenAI's chat completions have them

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
            "calls",
            "logprobs",
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
    """An OpenAI-compatible server. `token`: the running app's own; default: QUIRE_API_KEY."""

    def __init__(
        self, url: str, model: str | None = None, token: str = "", verify: ssl.SSLContext | bool = True
    ) -> None:
        self._base = url.rstrip("/").removesuffix("/v1")
        if not self._base.startswith(("http://", "https://")):
            raise ServerUnreachableError(
                f"{url!r} is no address",
                value=url,
                param="--url",
                remedy="Use one like http://127.0.0.1:8501.",
            )
        self._client = httpx.Client(timeout=_TIMEOUT, headers=authorization(url, token), verify=verify)
        self.name = model or self._first_model()

    def ask(self, messages: Messages, options: ChatOptions, answer: Answer) -> Iterator[str]:
        from workbench.backends.openai import request_body

        body = {**request_body(self.name, options.params), "messages": messages}
        if options.tools:
            body["tools"] = list(options.tools)
        if options.params.logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": options.params.logprobs}
        try:
            with self._client.stream("POST", self._address("/chat/completions"), json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise _server_error(response)
                yield from _read_events(response.iter_lines(), answer)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        answer.e2e_ms = (time.monotonic() - answer.started) * 1e3

    def close(self) -> None:
        self._client.close()

    def _address(self, path: str) -> str:
        return f"{self._base}/v1{path}"

    def _first_model(self) -> str:
        try:
            response = self._client.get(self._address("/models"))
            if response.status_code in (401, 403):
                raise _server_error(response)
            name: str = response.raise_for_status().json()["data"][0]["id"]
        except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
            raise self._unreachable(error) from error
        return name

    def _unreachable(self, error: Exception) -> ServerUnreachableError:
        return ServerUnreachableError(
            f"no server with a model answers at {self._base} ({type(error).__name__}: {error})",
            value=self._base, param="--url", remedy="Start one with `quire up`, or leave --url out.",
        )  # fmt: skip


class EndpointPartner(ServerPartner):
    """A named endpoint's model. Raises EndpointError, UnknownEndpointError, and what its parameters do not fit."""

    def __init__(self, settings: Settings, model: str) -> None:
        from workbench.backends.by_id import find_endpoint
        from workbench.backends.endpoints import parse_id

        self._endpoint = find_endpoint(model, settings)
        self._base = self._endpoint.url
        self._client = httpx.Client(timeout=_TIMEOUT, headers=self._endpoint.headers())
        self.name = parse_id(model).model or self._endpoint.model or self._first_model()

    def ask(self, messages: Messages, options: ChatOptions, answer: Answer) -> Iterator[str]:
        from workbench.backends.endpoint_backend import fit

        return super().ask(messages, replace(options, params=fit(self._endpoint, options.params)), answer)

    def _address(self, path: str) -> str:
        return self._endpoint.address(path, self.name)


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
        from workbench.api.wire import chat_token
        from workbench.chat_output import Content, Reasoning, gather

        worker = self._host.worker()
        ready = prepare(worker, messages, options.params, options.tools)
        parser, stream = ready.syntax.parser(), worker.submit(ready.prompt_ids, ready.params)
        all_pieces: list[Piece] = []
        for delta in stream:
            pieces = parser.push(delta.text or "")
            if delta.finish_reason is not None:
                pieces += parser.finish()
            all_pieces += pieces
            found = gather(piece for piece in pieces if isinstance(piece, Content | Reasoning))
            yield answer.took(found.content, found.reasoning)
        whole = gather(all_pieces)
        answer.text = whole.content  # a call that broke off is content
        answer.calls = [{"name": call.name, "arguments": call.arguments} for call in whole.calls]
        done = stream.completion
        assert done is not None
        answer.finish_reason, answer.completion_tokens = done.finish_reason.value, done.num_output_tokens
        answer.prompt_tokens, answer.cached_tokens = done.num_prompt_tokens, done.num_cached_tokens
        answer.ttft_ms, answer.e2e_ms = done.ttft_ms, done.e2e_ms
        if options.params.logprobs is not None:
            answer.logprobs = [chat_token(entry, ready.tokenizer.token_text) for entry in done.logprobs]
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
    """Of a server, of the app of this HOME_DIR, or an engine of our own. A registered version is the app's: it has the registry."""
    if url is not None:
        return ServerPartner(url, model)
    if model is not None and model.startswith("endpoint:"):
        return EndpointPartner(settings, model)
    if model is not None and settings.model != model:
        app = RunState(settings.run_dir).read()
        if app is None:
            raise ServerUnreachableError(
                f"{model} is a version of the registry, and no app runs under {settings.home_dir}", value=model, param="--model",
                remedy="Start one with `quire up` and load it, or name a folder or hub id.",
            )  # fmt: skip
        return ServerPartner(app.url, model, app.token, app.trust)
    if model is None and settings.model is None and not settings.fake:
        app = RunState(settings.run_dir).read()
        if app is not None:
            try:
                return ServerPartner(app.url, token=app.token, verify=app.trust)
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
    """Ask and print; the first of several answers is what the conversation goes on with."""
    messages.append({"role": "user", "content": question})
    out, answers = sys.stderr if as_json else sys.stdout, []
    for params in options.params.each():
        answers.append(answer := Answer())
        for text in partner.ask(messages, replace(options, params=params), answer):
            print(text, end="", file=out, flush=True)
        print(
            "".join(f"\n→ {call['name']}({call['arguments']})" for call in answer.calls), file=out, flush=True
        )
    messages.append({"role": "assistant", "content": answers[0].text})
    if as_json:
        others = {"others": [answer.as_dict() for answer in answers[1:]]} if answers[1:] else {}
        print(json.dumps({"model": partner.name, **answers[0].as_dict(), **others}), flush=True)


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
            answer.logprobs += (choice.get("logprobs") or {}).get("content") or []
            for call in delta.get("tool_calls") or ():
                _add_call(answer, call)
            yield answer.took(delta.get("content") or "", reasoning)


def _add_call(answer: Answer, delta: dict[str, Any]) -> None:
    """Keep a piece of a streamed call: its name comes first, its arguments in fragments."""
    while len(answer.calls) <= delta["index"]:
        answer.calls.append({"name": "", "arguments": ""})
    call, function = answer.calls[delta["index"]], delta.get("function") or {}
    call["name"] += function.get("name") or ""
    call["arguments"] += function.get("arguments") or ""


def _server_error(response: httpx.Response) -> WorkbenchError:
    try:
        error = response.json()["error"]
        message, code, param = error["message"], error.get("code"), error.get("param")
    except (ValueError, LookupError, TypeError):
        message, code, param = response.text[:200], None, None
    kind = NotReadyError if response.status_code >= 500 else ApiError
    return kind(message, value=code, param=param)
