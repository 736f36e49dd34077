"""An endpoint's answer in the Playground: read as it comes, in the form in which an engine's answer is.

Tokens have no ids on that wire: each text gets a number of its own here, so that probabilities are shown token by token. Content,
reasoning and tool calls come apart already; nothing is parsed out of the text.

No Streamlit here. Boundary: one streamed chat completion.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import httpx

from engine.plan import TokenLogprobs
from engine.records import Completion, StreamDelta
from engine.request import FinishReason
from workbench.backends.discovery import client_of
from workbench.backends.endpoint_backend import fit
from workbench.backends.endpoints import Endpoint, parse_id
from workbench.backends.openai import request_body
from workbench.backends.openai_answer import UNKNOWN_TOKEN, StreamedAnswer, events_of
from workbench.backends.protocol import BackendUnsupportedError
from workbench.backends.retries import REFUSED, RefusedForNow, Retries, retry_after_s
from workbench.backends.wire import error_of, lost
from workbench.chat_output import CallArguments, CallStart, Content, Piece, Reasoning

if TYPE_CHECKING:
    from engine.sampling_params import SamplingParams

_TIMEOUT = httpx.Timeout(600.0, connect=5.0)


class EndpointStream:
    """A running answer, its tokens' texts, and what it consists of. Made and read by one thread; `abort` from any.

    Raises:
        BackendUnsupportedError: this kind of endpoint does not take a parameter, or no tools.
        BackendError, BackendLostError, EndpointKeyError: it refuses, or does not answer.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        model: str,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams,
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        request_id: str = "",
    ) -> None:
        self.params = params
        self.completion: Completion | None = None
        self._request_id = request_id
        self._name = f"endpoint {endpoint.name}"
        self._is_aborted = False
        self._said = ""
        self._pieces: list[Piece] = []
        self._texts: list[str] = []
        self._ids: dict[str, int] = {}
        body = _body(endpoint, parse_id(model).model or endpoint.model, messages, params, tools)
        self._client = client_of(endpoint, _TIMEOUT)
        try:
            self._answer = StreamedAnswer(params)
            self._response = self._open(endpoint.address("/chat/completions", body["model"]), body)
        except BaseException:
            self._client.close()
            raise

    def abort(self) -> None:
        """Leave: the server ends a request whose client is gone. The reader wakes up at once."""
        self._is_aborted = True
        stream = self._response.extensions.get("network_stream")
        with contextlib.suppress(OSError, AttributeError):
            stream.get_extra_info("socket").shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]

    def __iter__(self) -> Iterator[StreamDelta]:
        found: list[TokenLogprobs] = []
        try:
            for event in events_of(self._response.iter_lines()):
                self._answer.take(event)
                for choice in event.get("choices") or ():
                    yield self._delta(choice, found)
        except (httpx.HTTPError, OSError) as error:
            if not self._is_aborted:
                raise lost(self._name, error) from error
        finally:
            self._response.close()
            self._client.close()
            self.completion = self._finished(found)

    # ── what reads its text ─────────────────────────────────────────────────────────────────────────────────────────

    def push(self, text: str) -> list[Piece]:
        """The parts of what came last: the wire told them apart."""
        pieces, self._pieces = self._pieces, []
        return pieces

    def finish(self) -> list[Piece]:
        return self.push("")

    def token_text(self, token_id: int) -> str:
        return self._texts[token_id] if 0 <= token_id < len(self._texts) else ""

    def detokenizer(self, skip_special_tokens: bool = True) -> _Joined:
        return _Joined(self)

    # ── inside ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _open(self, url: str, body: dict[str, Any]) -> httpx.Response:
        def send() -> httpx.Response:
            self._answer.sent = time.monotonic()
            request = self._client.build_request(
                "POST", url, json=body, headers={"x-request-id": self._request_id}
            )
            response = self._client.send(request, stream=True)
            if response.status_code == 200:
                return response
            response.read()
            error = error_of(response, self._name)
            if response.status_code in REFUSED:
                raise RefusedForNow(error, retry_after_s(response.headers))
            raise error

        try:
            return Retries().run(send)
        except httpx.HTTPError as error:
            raise lost(self._name, error) from error

    def _delta(self, choice: dict[str, Any], found: list[TokenLogprobs]) -> StreamDelta:
        delta = choice.get("delta") or {}
        text, reasoning = (
            delta.get("content") or "",
            delta.get("reasoning") or delta.get("reasoning_content") or "",
        )
        if reasoning:
            self._pieces.append(Reasoning(reasoning))
        if text:
            self._pieces.append(Content(text))
        for call in delta.get("tool_calls") or ():
            function, index = call.get("function") or {}, int(call.get("index", 0))
            if function.get("name"):
                self._pieces.append(CallStart(index, call.get("id") or f"call_{index}", function["name"]))
            if function.get("arguments"):
                self._pieces.append(CallArguments(index, function["arguments"]))
        told = [self._token(each) for each in (choice.get("logprobs") or {}).get("content") or ()]
        found += told
        said = text or reasoning or delta.get("tool_calls")
        ids = tuple(each.token_id for each in told) or ((UNKNOWN_TOKEN,) if said else ())
        self._said += reasoning + text
        return StreamDelta(
            self._request_id, ids, reasoning + text, tuple(told), created_ns=time.monotonic_ns(),
            finish_reason=self._answer.finish_reason if choice.get("finish_reason") else None,
        )  # fmt: skip

    def _token(self, entry: dict[str, Any]) -> TokenLogprobs:
        top = [
            (self._id(str(each["token"])), float(each["logprob"])) for each in entry.get("top_logprobs") or ()
        ]
        own = self._id(str(entry["token"]))
        ids = tuple(token for token, _ in top)
        rank = ids.index(own) + 1 if own in ids else len(ids) + 1
        return TokenLogprobs(own, float(entry["logprob"]), rank, ids, tuple(p for _, p in top))

    def _id(self, text: str) -> int:
        if text not in self._ids:
            self._ids[text] = len(self._texts)
            self._texts.append(text)
        return self._ids[text]

    def _finished(self, found: list[TokenLogprobs]) -> Completion:
        done = replace(self._answer.completion(), text=self._said)
        if self._is_aborted:
            done = replace(done, finish_reason=FinishReason.ABORT, error=None)
        # Shown token by token only where the tokens are the whole text: some servers tell those of the content alone.
        joined = self.detokenizer().push([each.token_id for each in found])
        if found and joined.startswith(self._said):
            return replace(done, token_ids=tuple(each.token_id for each in found), logprobs=tuple(found))
        return replace(done, logprobs=())


class _Joined:
    """Texts of tokens, one after the other."""

    def __init__(self, stream: EndpointStream) -> None:
        self._stream = stream

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join(map(self._stream.token_text, token_ids))


def _body(
    endpoint: Endpoint,
    model: str | None,
    messages: Sequence[Mapping[str, Any]],
    params: SamplingParams,
    tools: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    if tools and not endpoint.abilities.can("tools"):
        raise BackendUnsupportedError(
            f"endpoint {endpoint.name} takes no tools",
            value=[json.dumps(tool)[:80] for tool in tools],
            param="tools",
        )
    fitting = fit(endpoint, params)
    body = {**request_body(model, fitting), "messages": [dict(message) for message in messages]}
    if tools:
        body["tools"] = [dict(tool) for tool in tools]
    if fitting.logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": fitting.logprobs}
    return body
