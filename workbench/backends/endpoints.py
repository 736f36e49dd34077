"""Endpoints: other OpenAI-compatible servers by name, as ``endpoint:NAME/MODEL`` names their models everywhere.

    quire endpoints add gpu http://10.0.0.7:8000            then: quire chat --model endpoint:gpu/qwen3

The table holds addresses and the NAMES of environment variables that hold keys, never a key: each process reads the variable
when it asks. An address is checked when it is added: only http and https, no credentials in it, none that leads to a
machine's own metadata service; a key goes over TLS or inside private networks only.

Boundary: names, addresses, headers. What answers there is `discovery`'s, asking it `endpoint_backend`'s.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import sqlalchemy as sa

from workbench.backends.endpoint_kinds import AZURE, KINDS, OPENAI, Kind
from workbench.errors import WorkbenchError
from workbench.store import endpoints as table
from workbench.store import utc_now

if TYPE_CHECKING:
    from workbench.store import Store

PREFIX = "endpoint:"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_API_VERSION = re.compile(r"[0-9A-Za-z.-]{1,32}")
_PRIVATE_SUFFIXES = (".local", ".internal", ".lan", ".svc", ".localhost")


class EndpointError(WorkbenchError, ValueError):
    """An endpoint cannot be described like that."""

    code = "invalid_endpoint"


class EndpointKeyError(EndpointError):
    """The environment variable that should hold an endpoint's key is not set in this process."""

    code = "endpoint_key_missing"


class UnknownEndpointError(WorkbenchError, LookupError):
    """No endpoint has that name."""

    code = "endpoint_not_found"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One server. Make it with `endpoint`, which checks it."""

    name: str
    url: str  # without /v1 and without a slash at its end
    kind: str = OPENAI
    key_env: str | None = None
    model: str | None = None
    api_version: str | None = None  # of Azure: its addresses by deployment instead of its v1 API
    created_at: str = ""

    @property
    def abilities(self) -> Kind:
        return KINDS[self.kind]

    @property
    def base_url(self) -> str:
        """Of the OpenAI-compatible API: what clients call their base URL."""
        return f"{self.url}{self.abilities.v1_path}"

    def address(self, path: str, model: str | None) -> str:
        """Where a model is asked; `path` as in ``/chat/completions``."""
        if self.kind == AZURE and self.api_version:
            return f"{self.url}/openai/deployments/{model or self.model}{path}?api-version={self.api_version}"
        return f"{self.base_url}{path}"

    def headers(self) -> dict[str, str]:
        """What proves who asks. Raises EndpointKeyError."""
        if self.key_env is None:
            return {}
        key = os.environ.get(self.key_env, "").strip()
        if not key:
            raise EndpointKeyError(
                f"the endpoint {self.name} has its key in {self.key_env}, which is not set", value=self.key_env,
                param="key_env", remedy=f"Set {self.key_env} where this process is started.",
            )  # fmt: skip
        header = self.abilities.key_header
        return {header: f"Bearer {key}" if header == "authorization" else key}

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class ModelId:
    """``endpoint:NAME/MODEL``, in parts."""

    endpoint: str
    model: str | None

    def __str__(self) -> str:
        return f"{PREFIX}{self.endpoint}" + (f"/{self.model}" if self.model else "")


def is_endpoint(model: str | None) -> bool:
    """Whether a model's id names one of an endpoint."""
    return model is not None and model.startswith(PREFIX)


def parse_id(model: str) -> ModelId:
    """The parts of an id; the endpoint's own model where it names none. Raises EndpointError."""
    name, _, rest = model.removeprefix(PREFIX).partition("/")
    if not is_endpoint(model) or not _NAME.fullmatch(name):
        raise EndpointError(
            f"{model!r} names no endpoint's model", value=model, limit=f"{PREFIX}NAME/MODEL", param="model",
            remedy="`quire endpoints list` has the names.",
        )  # fmt: skip
    return ModelId(name, rest or None)


def endpoint(
    name: str,
    url: str,
    *,
    kind: str = OPENAI,
    key_env: str | None = None,
    model: str | None = None,
    api_version: str | None = None,
) -> Endpoint:
    """A checked endpoint; `url` may end with the path of its OpenAI-compatible API. Raises EndpointError."""
    if not _NAME.fullmatch(name):
        raise _wrong(f"{name!r} is no name", name, "letters, digits, dots, dashes; at most 64", "name")
    if kind not in KINDS:
        raise _wrong(f"{kind!r} is no kind of endpoint", kind, sorted(KINDS), "kind")
    if key_env is not None and not _VARIABLE.fullmatch(key_env):
        raise EndpointError(  # it may be the key itself: it is not repeated
            "the key must be named by an environment variable", limit="letters, digits and underscores", param="key_env",
            remedy="Put the key into a variable and give the variable's name, for example OPENAI_API_KEY.",
        )  # fmt: skip
    if api_version is not None and (kind != AZURE or not _API_VERSION.fullmatch(api_version)):
        raise _wrong(
            f"api-version {api_version!r} is for Azure only", api_version, "2024-10-21", "api_version"
        )
    if api_version is not None and not model:
        raise _wrong("Azure's addresses by deployment need its name", model, "a deployment's name", "model")
    plain = check_url(url, with_key=key_env is not None)
    plain = plain.removesuffix(KINDS[kind].v1_path).removesuffix("/v1").rstrip("/")
    return Endpoint(name, plain, kind, key_env, model, api_version)


def check_url(url: str, *, with_key: bool) -> str:
    """The address without slashes at its end. Raises EndpointError; credentials in it are not repeated."""
    try:
        parts = urlsplit(url.strip())
        host, _ = (parts.hostname or "").rstrip("."), parts.port
    except ValueError:
        raise _wrong("that is no address", None, "http://HOST:PORT", "url") from None
    if parts.username is not None or parts.password is not None:
        raise EndpointError(
            "an address must not hold credentials", limit="http://HOST:PORT", param="url",
            remedy="Put the key into an environment variable and name it with --key-env.",
        )  # fmt: skip
    if parts.scheme not in ("http", "https") or not host:
        raise _wrong(f"{url!r} is no address", url, "http://HOST:PORT or https://HOST", "url")
    if parts.query or parts.fragment:
        raise _wrong(
            "an address has no query; Azure's api-version has its own option", None, "http://HOST:PORT", "url"
        )
    address = _ip(host)
    if address is not None and (address.is_link_local or address.is_multicast or address.is_unspecified):
        raise _wrong(
            f"{host} is not an address of a server", host, "no link-local or multicast address", "url"
        )
    if with_key and parts.scheme == "http" and not _is_private(host, address):
        raise _wrong(f"a key would go to {host} unencrypted", url, "https outside of private networks", "url")
    return url.strip().rstrip("/")


class Endpoints:
    """The endpoints of one HOME_DIR. Thread-safe, as its store is. Every method may raise StoreError."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def add(self, new: Endpoint, *, replace: bool = False) -> Endpoint:
        """Keep an endpoint. Raises EndpointError: the name is in use, and not to be replaced."""
        row = {**new.as_dict(), "created_at": utc_now()}
        with self._store.begin() as connection:
            if replace:
                connection.execute(sa.delete(table).where(table.c.name == new.name))
            elif connection.execute(sa.select(table.c.name).where(table.c.name == new.name)).first():
                raise _wrong(
                    f"the endpoint {new.name!r} is there already",
                    new.name,
                    "a new name, or --replace",
                    "name",
                )
            connection.execute(sa.insert(table).values(**row))
        return Endpoint(**row)

    def list(self) -> list[Endpoint]:
        with self._store.read() as connection:
            rows = connection.execute(sa.select(table).order_by(table.c.name)).mappings()
            return [_from_row(row) for row in rows]

    def get(self, name: str) -> Endpoint:
        """Raises UnknownEndpointError."""
        with self._store.read() as connection:
            row = connection.execute(sa.select(table).where(table.c.name == name)).mappings().first()
        if row is None:
            known = [each.name for each in self.list()]
            raise UnknownEndpointError(
                f"there is no endpoint {name!r}", value=name, limit=known, param="endpoint",
                remedy=f"Known: {', '.join(known) or 'none; add one with `quire endpoints add NAME URL`'}.",
            )  # fmt: skip
        return _from_row(row)

    def remove(self, name: str) -> None:
        """Raises UnknownEndpointError."""
        self.get(name)
        with self._store.begin() as connection:
            connection.execute(sa.delete(table).where(table.c.name == name))


def _from_row(row: Mapping[Any, Any]) -> Endpoint:
    return Endpoint(**{str(name): value for name, value in row.items()})


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _is_private(host: str, address: ipaddress.IPv4Address | ipaddress.IPv6Address | None) -> bool:
    """An address of a private network, or a name that only such a network knows."""
    if address is not None:
        return address.is_private
    return "." not in host or host.endswith((*_PRIVATE_SUFFIXES, ".svc.cluster.local"))


def _wrong(message: str, value: Any, limit: Any, param: str) -> EndpointError:
    return EndpointError(
        message, value=value, limit=limit, param=param, remedy="See `quire endpoints add --help`."
    )
