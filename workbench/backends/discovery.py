"""What answers at an address: its kind, its version, its models; asked by the routes that only that kind has.

    GET {base}/models         every kind; ``owned_by`` names Quire, vLLM, llama.cpp and MLflow's gateway
    GET /api/version, /tags   Ollama          GET /props          llama.cpp
    GET /api/v0/models        LM Studio       GET /version        vLLM

A hosted service is known by its name (Azure) or taken as OpenAI's own kind. No answer is believed further than its form: a
route that is not there, or says something else, counts as not that kind. Redirects are not followed.

Boundary: a few GETs to one address. What it is asked to answer is `endpoint_backend`'s; how busy it is, ``workbench.fleet``'s.
Sources: as `endpoint_kinds`; ollama/docs/api.md; lmstudio.ai/docs/developer/rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from workbench.backends.endpoint_kinds import (
    AZURE,
    KINDS,
    LLAMA_CPP,
    LM_STUDIO,
    MLFLOW,
    OLLAMA,
    OPENAI,
    QUIRE,
    VLLM,
)
from workbench.backends.endpoints import Endpoint, endpoint
from workbench.backends.protocol import BackendError, BackendLostError

TIMEOUT = httpx.Timeout(5.0, connect=2.0)
_OWNERS = {"quire": QUIRE, "vllm": VLLM, "llamacpp": LLAMA_CPP, "mlflow": MLFLOW}
_AZURE_HOSTS = (".openai.azure.com", ".cognitiveservices.azure.com", ".services.ai.azure.com")
_MAX_BYTES = 4 << 20  # of one answer: hosted services list hundreds of models


@dataclass(frozen=True, slots=True)
class Found:
    """What is there. `models`: their ids, as the server lists them."""

    kind: str
    version: str
    models: tuple[str, ...]


def client_of(asked: Endpoint, timeout: httpx.Timeout = TIMEOUT) -> httpx.Client:
    """For questions to an endpoint: follows no redirect and heeds no proxy of the environment. Raises EndpointKeyError."""
    is_tls = asked.url.startswith(
        "https"
    )  # where it is not, reading certificates would cost more than the question
    return httpx.Client(
        headers=asked.headers(), timeout=timeout, follow_redirects=False, trust_env=False, verify=is_tls
    )


def guess_kind(url: str) -> str | None:
    """What an address says by itself; None: it has to be asked."""
    parts = urlsplit(url)
    if (parts.hostname or "").endswith(_AZURE_HOSTS):
        return AZURE
    return MLFLOW if KINDS[MLFLOW].v1_path in parts.path else None


def discover(asked: Endpoint) -> Found:
    """Ask it; of the kind of `asked` only the key's header and the path of the API are taken for granted.

    Raises:
        EndpointKeyError: its key is not in the environment.
        BackendLostError: nothing answers.
        BackendError: what answers is no OpenAI-compatible server, refuses the key, or sends somewhere else.
    """
    with client_of(asked) as client:
        listed = _models(client, asked)
        owners = {str(each.get("owned_by", "")).lower() for each in listed}
        owned = next((kind for owner, kind in _OWNERS.items() if owner in owners), None)
        kind = asked.kind if asked.kind in (AZURE, MLFLOW) else owned
        version = ""
        for each, read in _VERSIONS.items():
            if kind == each or (kind is None and each in _BY_ROUTE):
                told = read(client, asked.url)
                kind, version = (each, told) if told is not None else (kind, version)
    return Found(kind or asked.kind, version, tuple(str(each["id"]) for each in listed))


def identify(name: str, url: str, **given: Any) -> tuple[Endpoint, Found]:
    """An endpoint whose kind was not said: checked, asked, and of the kind that answered. Raises as `endpoint` and `discover`."""
    first = endpoint(name, url, kind=guess_kind(url) or OPENAI, **given)
    found = discover(first)
    return endpoint(name, url, kind=found.kind, **given), found


def get_json(client: httpx.Client, url: str) -> Any:
    """The JSON of a GET that answered 200 with a body of reasonable size; None otherwise. Raises httpx.HTTPError."""
    with client.stream("GET", url) as response:
        body = b""
        for piece in response.iter_bytes():
            body += piece
            if len(body) > _MAX_BYTES:
                return None
    try:
        return httpx.Response(200, content=body).json() if response.status_code == 200 else None
    except ValueError:
        return None


def _models(client: httpx.Client, asked: Endpoint) -> list[dict[str, Any]]:
    if asked.api_version:  # Azure lists what can be deployed there, not what is
        return [{"id": asked.model}]
    url = f"{asked.base_url}/models"
    try:
        response = client.get(url)
    except httpx.HTTPError as error:
        raise BackendLostError(
            f"nothing answers at {url} ({type(error).__name__}: {error})", value=asked.url, param="url",
            remedy="Start it, or correct the address.",
        ) from error  # fmt: skip
    if response.is_redirect:
        raise BackendError(
            f"{url} sends elsewhere, and redirects are not followed", value=response.headers.get("location"), param="url",
            remedy="Add the endpoint by the address that it leads to, if you trust it.",
        )  # fmt: skip
    if response.status_code in (401, 403):
        raise BackendError(
            f"{url} wants a key (status {response.status_code})", value=response.status_code, param="key_env",
            remedy="Put it into an environment variable and name that with --key-env.",
        )  # fmt: skip
    try:
        listed = response.raise_for_status().json()["data"]
        return [each for each in listed if isinstance(each, dict) and "id" in each]
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise BackendError(
            f"{url} is no OpenAI-compatible list of models (status {response.status_code})", value=response.status_code,
            param="url", remedy="Give the address of the API, without /chat/completions.",
        ) from error  # fmt: skip


def _told(client: httpx.Client, url: str) -> dict[str, Any]:
    """The object that a route of one kind answers with; empty where it is not there."""
    try:
        found = get_json(client, url)
    except httpx.HTTPError:
        return {}
    return found if isinstance(found, dict) else {}


def _quire(client: httpx.Client, url: str) -> str | None:
    told = _told(client, f"{url}/load")
    return str(told.get("version", "")) if "max_num_seqs" in told else None


def _vllm(client: httpx.Client, url: str) -> str | None:
    version = _told(client, f"{url}/version").get("version")
    return None if version is None else str(version)


def _ollama(client: httpx.Client, url: str) -> str | None:
    version = _told(client, f"{url}/api/version").get("version")
    return str(version) if version is not None and "models" in _told(client, f"{url}/api/tags") else None


def _llama_cpp(client: httpx.Client, url: str) -> str | None:
    told = _told(client, f"{url}/props")
    return str(told.get("build_info", "")) if "total_slots" in told else None


def _lm_studio(client: httpx.Client, url: str) -> str | None:
    listed = _told(client, f"{url}/api/v0/models").get("data")
    is_one = isinstance(listed, list) and any("state" in each for each in listed if isinstance(each, dict))
    return "" if is_one else None


_BY_ROUTE = (
    OLLAMA,
    LM_STUDIO,
    LLAMA_CPP,
)  # known by a route of their own, since ``owned_by`` names no server there
_VERSIONS = {QUIRE: _quire, VLLM: _vllm, OLLAMA: _ollama, LM_STUDIO: _lm_studio, LLAMA_CPP: _llama_cpp}
