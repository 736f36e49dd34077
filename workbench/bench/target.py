"""Target: the server that a benchmark loads, and what it tells of itself before the run.

Tokens are counted by the server: it is asked, with a few one-token requests, how many tokens each of some common words adds
to a prompt, and prompts of a given length are made of these words. That holds for any tokenizer behind any URL.

Boundary: questions before the run, over plain HTTP. The load itself is `driver`'s.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx

from workbench.access.client_key import authorization
from workbench.bench.errors import BenchmarkError
from workbench.bench.spec import BenchmarkSpec
from workbench.bench.workload import WordCosts, Workload
from workbench.errors import ServerUnreachableError, UnknownModelError
from workbench.settings import Settings

API_KEY_VARIABLE = "OPENAI_API_KEY"
LEAD = "of"
_WORD_LIST = (
    "the and to in is it for on as with that at by from we you he she or an will one all not be this have but are was "
    "can if do go up so my me no out time year day way new now"
)
WORDS = tuple(_WORD_LIST.split())
_COPIES = 8
_ENOUGH_WORDS = 8
_QUESTIONS_AT_ONCE = 4
_TIMEOUT = httpx.Timeout(120.0, connect=5.0)


@dataclass(frozen=True, slots=True)
class Target:
    """Whom to load."""

    base_url: str  # ends with /v1
    model: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    is_quire: bool = False  # takes ignore_eos, and its first event comes with the first token
    max_model_len: int | None = None
    forces_length: bool = False  # takes ignore_eos

    def body(
        self, messages: Any, max_tokens: int, *, force: bool, temperature: float, stream: bool
    ) -> dict[str, Any]:
        """The request's JSON."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "stream": stream,
        }
        if stream:
            body["stream_options"] = {"include_usage": True}
        if force and self.forces_length:
            body["ignore_eos"] = True
        return body


def find_target(url: str, model: str | None, token: str = "") -> Target:
    """Ask a server what it has. `token`: of the running app, where it is that one.

    Raises:
        ServerUnreachableError: nothing answers there, or not as an OpenAI-compatible server.
        UnknownModelError: it has no such model.
    """
    base = url.rstrip("/")
    base = base if base.endswith("/v1") else f"{base}/v1"
    return _target(base, model, authorization(base, token, otherwise=os.environ.get(API_KEY_VARIABLE)))


def endpoint_target(model: str, settings: Settings) -> Target:
    """The target of an ``endpoint:NAME/MODEL``, with the key that its endpoint names.

    Raises:
        UnknownEndpointError, EndpointKeyError: there is no such endpoint, or its key is not in the environment.
        BenchmarkError: it is asked by another address for each model (Azure's by deployment).
        ServerUnreachableError, UnknownModelError: as `find_target`.
    """
    from workbench.backends.by_id import find_endpoint
    from workbench.backends.endpoints import parse_id

    endpoint = find_endpoint(model, settings)
    if endpoint.api_version:
        raise BenchmarkError(
            f"{endpoint.name} has its models at addresses of their own (api-version {endpoint.api_version})", value=model,
            param="model", remedy="Add it without --api-version: Azure's v1 API has one address for all.",
        )  # fmt: skip
    return _target(endpoint.base_url, parse_id(model).model or endpoint.model, endpoint.headers())


def _target(base: str, model: str | None, headers: dict[str, str]) -> Target:
    try:
        response = httpx.get(f"{base}/models", headers=headers, timeout=_TIMEOUT)
        listed: list[dict[str, Any]] = response.raise_for_status().json()["data"]
        ids = [str(entry["id"]) for entry in listed]
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise ServerUnreachableError(
            f"no server with a model answers at {base} ({type(error).__name__}: {error})", value=base, param="url",
            remedy="Start one with `quire up`, or leave the address out.",
        ) from error  # fmt: skip
    if not ids or (model is not None and model not in ids):
        raise UnknownModelError(
            f"{base} has no model {model!r}", value=model, limit=ids, param="model",
            remedy=f"Models there: {', '.join(ids) or 'none'}.",
        )  # fmt: skip
    entry = listed[ids.index(model) if model else 0]
    target = Target(
        base, str(entry["id"]), headers, is_quire=entry.get("owned_by") == "quire",
        max_model_len=entry.get("max_model_len"),
    )  # fmt: skip
    return _with_forced_length(target)


def measure_words(target: Target) -> WordCosts:
    """How many tokens each of some common words adds to a prompt on this server.

    Raises:
        BenchmarkError: the server tells no token counts, or refuses one-token requests.
    """
    with httpx.Client(headers=dict(target.headers), timeout=_TIMEOUT) as client:
        lead = _prompt_tokens(client, target, LEAD)
        questions = [" ".join([LEAD, *[word] * _COPIES]) for word in WORDS]
        with ThreadPoolExecutor(_QUESTIONS_AT_ONCE) as pool:
            counts = list(pool.map(lambda text: _prompt_tokens(client, target, text), questions))
    # Words whose cost depends on their neighbours are left out.
    costs = {
        word: (count - lead) // _COPIES
        for word, count in zip(WORDS, counts, strict=True)
        if count > lead and (count - lead) % _COPIES == 0
    }
    if not costs:
        raise BenchmarkError(
            "this server's token counts do not grow with the prompt", value=counts[:3], param="url",
            remedy="Use a dataset instead of synthetic lengths.",
        )  # fmt: skip
    single = {word: cost for word, cost in costs.items() if cost == 1}
    chosen = single if len(single) >= _ENOUGH_WORDS else costs
    return WordCosts(LEAD, lead, tuple(chosen), tuple(chosen.values()))


def check_fits(target: Target, spec: BenchmarkSpec, workload: Workload) -> None:
    """Raise BenchmarkError when a request is longer than the model's context; nothing was sent yet."""
    if target.max_model_len is None:
        return
    longest = max((r.asked_input_tokens or 1) + r.max_tokens for r in workload.measured)
    if longest > target.max_model_len:
        raise BenchmarkError(
            f"a request of {longest} tokens does not fit {target.model}'s context of {target.max_model_len}",
            value=longest, limit=target.max_model_len, param="input_tokens",
            remedy="Ask for fewer input or output tokens.",
        )  # fmt: skip


def _with_forced_length(target: Target) -> Target:
    """Find out, by one request of one token, whether the server takes ignore_eos."""
    trial = Target(
        target.base_url,
        target.model,
        target.headers,
        target.is_quire,
        target.max_model_len,
        forces_length=True,
    )
    if target.is_quire:
        return trial
    with httpx.Client(headers=dict(target.headers), timeout=_TIMEOUT) as client:
        response = _ask(client, trial, LEAD)
        return target if response.status_code in (400, 404, 422) else trial


def _prompt_tokens(client: httpx.Client, target: Target, text: str) -> int:
    response = _ask(client, target, text)
    try:
        return int(response.raise_for_status().json()["usage"]["prompt_tokens"])
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise BenchmarkError(
            f"{target.base_url} did not count a prompt's tokens ({error}): {response.text[:200]}",
            value=response.status_code, param="url",
            remedy="Check the model's name and key, or use a dataset instead of synthetic lengths.",
        ) from error  # fmt: skip


def _ask(client: httpx.Client, target: Target, text: str) -> httpx.Response:
    body = target.body([{"role": "user", "content": text}], 1, force=True, temperature=0.0, stream=False)
    try:
        return client.post(f"{target.base_url}/chat/completions", json=body)
    except httpx.HTTPError as error:
        raise ServerUnreachableError(
            f"{target.base_url} stopped answering ({type(error).__name__}: {error})", value=target.base_url, param="url",
            remedy="See the server's log.",
        ) from error  # fmt: skip
