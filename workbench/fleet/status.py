"""How an endpoint is now: its state, what is resident, and its load in slots and tokens, as far as its kind tells them.

    Quire       GET /load                                   everything here
    vLLM        GET /health, /metrics                       running, waiting, the share of the KV cache in use
    llama.cpp   GET /health, /props, /slots                 slots and how many of them compute
    LM Studio   GET /api/v0/models                          what is loaded
    Ollama      GET /api/ps                                 what is loaded
    others      GET {base}/models                           that it answers

What a server does not tell is None: utilisation is no measure of room, and no figure is better than a guessed one.

Boundary: one reading of one endpoint. When it is taken, and what is made of it, is the page's and the router's.
Sources: docs.vllm.ai "Production Metrics"; llama.cpp tools/server/README.md; ollama/docs/api.md; lmstudio.ai/docs/developer/rest.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import httpx

from workbench.backends.discovery import client_of, get_json
from workbench.backends.endpoint_kinds import LLAMA_CPP, LM_STUDIO, OLLAMA, QUIRE, VLLM
from workbench.backends.endpoints import Endpoint
from workbench.backends.protocol import BackendError, BackendLostError

TIMEOUT = httpx.Timeout(2.0, connect=1.0)
ADMIN_TIMEOUT = httpx.Timeout(10.0, connect=2.0)
READY, LOADING, DRAINING, NOT_READY = "ready", "loading", "draining", "not ready"
_SAMPLE = re.compile(
    r"^vllm:(num_requests_running|num_requests_waiting|kv_cache_usage_perc)(?:\{[^}]*\})? ([0-9.eE+-]+)", re.M
)


@dataclass(frozen=True, slots=True)
class Status:
    """One reading. None: not told."""

    state: str
    models: tuple[str, ...] = ()  # resident, or served
    version: str = ""
    message: str = ""
    running: int | None = None
    waiting: int | None = None
    waiting_tokens: int | None = None
    max_num_seqs: int | None = None  # slots
    num_blocks: int | None = None
    free_blocks: int | None = None
    kv_usage: float | None = None  # 0 … 1, of servers that tell no blocks
    latency_ms: float = 0.0  # of the first question

    @property
    def free_slots(self) -> int | None:
        """Requests that would begin at once; below 0 where more wait than fit."""
        if self.max_num_seqs is None or self.running is None:
            return None
        return self.max_num_seqs - self.running - (self.waiting or 0)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "free_slots": self.free_slots}


def read_status(endpoint: Endpoint, client: httpx.Client | None = None) -> Status:
    """Ask it how it is; within seconds. `client`: one of `discovery.client_of`, to be used again.

    Raises:
        BackendLostError: it does not answer.
        BackendError: it answers, but not as its kind does.
        EndpointKeyError: its key is not in the environment.
    """
    own = client or client_of(endpoint, TIMEOUT)
    started = time.monotonic()
    try:
        found = _READERS.get(endpoint.kind, _plain)(own, endpoint)
    except httpx.HTTPError as error:
        raise BackendLostError(
            f"{endpoint.name} does not answer ({type(error).__name__}: {error})", value=endpoint.url,
            remedy="See whether it runs; this is read again.",
        ) from error  # fmt: skip
    except (LookupError, TypeError, ValueError) as error:
        raise BackendError(
            f"{endpoint.name} does not answer as {endpoint.abilities.title} does ({type(error).__name__}: {error})",
            value=endpoint.url, remedy="See its kind with `quire endpoints check`.",
        ) from error  # fmt: skip
    finally:
        if client is None:
            own.close()
    return replace(found, latency_ms=(time.monotonic() - started) * 1e3)


def drain(endpoint: Endpoint, *, resume: bool = False) -> None:
    """Have a Quire instance take no more requests, or take them again; those that run go on.

    Raises:
        BackendError: it refuses, or is no Quire instance.
        BackendLostError: it does not answer.
    """
    if endpoint.kind != QUIRE:
        raise BackendError(
            f"{endpoint.name} is {endpoint.abilities.title}: only Quire's instances can be drained from here",
            value=endpoint.kind, limit=QUIRE,
        )  # fmt: skip
    from workbench.backends.wire import error_of, lost

    act = "resume" if resume else "drain"
    try:
        with client_of(endpoint, ADMIN_TIMEOUT) as client:
            response = client.post(f"{endpoint.url}/{act}", json={})
    except httpx.HTTPError as error:
        raise lost(f"endpoint {endpoint.name}", error) from error
    if response.status_code != 200:
        raise error_of(response, f"endpoint {endpoint.name}")


def _quire(client: httpx.Client, endpoint: Endpoint) -> Status:
    told = _object(client, f"{endpoint.url}/load")
    state = READY if told["ready"] else LOADING if told["phase"] == "loading" else NOT_READY
    return Status(
        DRAINING if told["draining"] else state, tuple(told["models"]), str(told["version"]),
        "" if told["phase"] == "ready" else str(told["message"]),
        running=int(told["running"]), waiting=int(told["waiting"]), waiting_tokens=int(told["waiting_tokens"]),
        max_num_seqs=int(told["max_num_seqs"]), num_blocks=int(told["num_blocks"]), free_blocks=int(told["free_blocks"]),
    )  # fmt: skip


def _vllm(client: httpx.Client, endpoint: Endpoint) -> Status:
    is_healthy = client.get(f"{endpoint.url}/health").status_code == 200
    totals: dict[str, float] = {}
    for name, value in _SAMPLE.findall(client.get(f"{endpoint.url}/metrics").text):
        totals[name] = totals.get(name, 0.0) + float(value)
    plain = _plain(client, endpoint)
    return replace(
        plain, state=plain.state if is_healthy else NOT_READY, running=_whole(totals, "num_requests_running"),
        waiting=_whole(totals, "num_requests_waiting"), kv_usage=totals.get("kv_cache_usage_perc"),
        version=str((get_json(client, f"{endpoint.url}/version") or {}).get("version", "")),
    )  # fmt: skip


def _llama_cpp(client: httpx.Client, endpoint: Endpoint) -> Status:
    health = client.get(f"{endpoint.url}/health")
    if health.status_code == 503:
        return Status(LOADING, message="Loading model")
    props = _object(client, f"{endpoint.url}/props")
    slots = get_json(client, f"{endpoint.url}/slots")  # can be switched off there
    running = sum(bool(slot.get("is_processing")) for slot in slots) if isinstance(slots, list) else None
    plain = _plain(client, endpoint)
    return replace(
        plain,
        running=running,
        max_num_seqs=int(props["total_slots"]),
        version=str(props.get("build_info", "")),
    )


def _ollama(client: httpx.Client, endpoint: Endpoint) -> Status:
    loaded = _object(client, f"{endpoint.url}/api/ps")["models"]
    version = _object(client, f"{endpoint.url}/api/version")["version"]
    names = tuple(str(each["name"]) for each in loaded)
    return Status(
        READY, names, str(version), "" if names else "No model is loaded; the first request loads one"
    )


def _lm_studio(client: httpx.Client, endpoint: Endpoint) -> Status:
    listed = _object(client, f"{endpoint.url}/api/v0/models")["data"]
    return Status(READY, tuple(str(each["id"]) for each in listed if each.get("state") == "loaded"))


def _plain(client: httpx.Client, endpoint: Endpoint) -> Status:
    if endpoint.api_version:  # Azure lists no deployments: that somebody answers has to do
        client.get(f"{endpoint.url}/openai/models?api-version={endpoint.api_version}")
        return Status(READY, (endpoint.model or "",))
    listed = _object(client, f"{endpoint.base_url}/models")["data"]
    return Status(READY, tuple(str(each["id"]) for each in listed))


_READERS: dict[str, Callable[[httpx.Client, Endpoint], Status]] = {
    QUIRE: _quire,
    VLLM: _vllm,
    LLAMA_CPP: _llama_cpp,
    OLLAMA: _ollama,
    LM_STUDIO: _lm_studio,
}


def _object(client: httpx.Client, url: str) -> dict[str, Any]:
    response = client.get(url)
    if response.status_code != 200:
        raise ValueError(f"{url} answered with status {response.status_code}")
    found = response.json()
    if not isinstance(found, dict):
        raise TypeError(f"{url} answered with a {type(found).__name__}")
    return found


def _whole(totals: dict[str, float], name: str) -> int | None:
    return int(totals[name]) if name in totals else None
