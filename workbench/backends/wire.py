"""What backends that speak HTTP share: the client, hanging up, and an OpenAI-shaped error object as the typed error that the
server had raised."""

from __future__ import annotations

import ssl
from collections.abc import Iterator, Mapping

import httpx

from engine.errors import QueueFullError, TypedError
from workbench.backends.protocol import BackendError, BackendLostError, ClosesItself


class HttpBackend(ClosesItself):
    """A backend at the other end of HTTP; `name` is what its errors call it."""

    def __init__(
        self,
        name: str,
        url: str,
        headers: Mapping[str, str],
        timeout: httpx.Timeout,
        verify: ssl.SSLContext | bool = True,
    ) -> None:
        self.name = name
        self.url = url
        self._headers = dict(headers)
        self._timeout = timeout
        self._verify = verify
        self._client = self._new_client()

    def close(self) -> None:
        self._client.close()

    def hang_up(self) -> None:
        """Break the connections: a server aborts the requests of a client that is gone."""
        old, self._client = self._client, self._new_client()
        old.close()

    def _new_client(self) -> httpx.Client:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        # Certificates are read only where they are looked at: 0.1 s.
        verify = self._verify if self.url.startswith("https") else False
        return httpx.Client(
            base_url=self.url, headers=self._headers, timeout=self._timeout, limits=limits, verify=verify
        )


def error_of(response: httpx.Response, who: str) -> TypedError:
    """The typed error of a refused request; BackendError where the code is not one of ours."""
    try:
        error = response.json()["error"]
        message = str(error["message"])
    except (ValueError, LookupError, TypeError):
        return BackendError(
            f"{who} answered with status {response.status_code}: {response.text[:200]!r}", value=response.status_code
        )  # fmt: skip
    facts = {name: error.get(name) for name in ("value", "limit", "remedy", "param")}
    if facts["remedy"] and message.endswith(facts["remedy"]):
        message = message.removesuffix(facts["remedy"]).rstrip(" .")
    kind = _kinds().get(str(error.get("code")), BackendError)
    if kind is QueueFullError and response.headers.get("retry-after", "").isdigit():
        facts["retry_after_s"] = int(response.headers["retry-after"])
    try:
        return kind(message, **facts)
    except TypeError:  # a type that is made in another way
        return BackendError(message, **facts)


def lost(who: str, error: Exception) -> BackendLostError:
    """The connection failed."""
    return BackendLostError(
        f"{who} does not answer ({type(error).__name__}: {error})", value=who,
        remedy="It may have been stopped or restarted: connect again.",
    )  # fmt: skip


def _kinds() -> dict[str, type[TypedError]]:
    return {kind.code: kind for kind in _tree(TypedError)}


def _tree(kind: type[TypedError]) -> Iterator[type[TypedError]]:
    # Children first: where a code is inherited, the type that introduced it stays.
    for child in kind.__subclasses__():
        yield from _tree(child)
    yield kind
