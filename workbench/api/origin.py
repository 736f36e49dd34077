"""Keeps other web sites out: requests must name this server as their Host, and come from its own pages.

A page of any site may ask the browser to talk to 127.0.0.1, and a hostile name may resolve to it or to us (DNS rebinding). So the
Host header must be an address that this server is known by, and an Origin, which browsers send with every cross-site request that
could do harm, must be this very server. There is no CORS header anywhere.

Known are: on loopback, loopback's names and addresses; off loopback also any literal address (rebinding needs a name) and the
names of ``QUIRE_ALLOWED_HOSTS``.

Boundary: headers of HTTP and WebSocket requests. It is no login.
"""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from workbench.api.errors import json_response

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?")


class OwnOrigin:
    """ASGI middleware: 403 unless Host names this server and Origin, if any, is the same host and port; 400 for two of one.

    `names`: hosts beside loopback that are this server, ``*.example.org`` for all below; `literal`: any address is.
    """

    def __init__(self, app: ASGIApp, names: tuple[str, ...] = (), literal: bool = False) -> None:
        self.app = app
        self._names = tuple(name.lower() for name in names)
        self._literal = literal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        origins = [value.decode("latin-1") for name, value in scope["headers"] if name == b"origin"]
        host, status = hosts[0] if hosts else "", 403
        if len(hosts) > 1 or len(origins) > 1:
            reason, param, status = "more than one Host or Origin header", "host", 400
        elif not self._is_own(host):
            reason, param = f"the Host header {host!r} is not this machine", "host"
        elif origins and not is_same_origin(origins[0], host):
            reason, param = f"requests from the origin {origins[0]!r} are refused", "origin"
        else:
            await self.app(scope, receive, send)
            return
        remedy = "Add the name to QUIRE_ALLOWED_HOSTS on the server" if self._literal else (
            "Use http://127.0.0.1 or http://localhost with the server's port"
        )  # fmt: skip
        body = {
            "error": {
                "message": f"{reason}. {remedy}.",
                "type": "invalid_request_error",
                "param": param,
                "code": "origin_refused",
            }
        }
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": "origin refused"})
            return
        await json_response(body, status)(scope, receive, send)

    def _is_own(self, host: str) -> bool:
        name = host_name(host)
        if name is None:
            return False
        return (
            is_loopback_host(host)
            or any(name == own or (own.startswith("*.") and name.endswith(own[1:])) for own in self._names)
            or (self._literal and _address(name) is not None)
        )


def is_loopback_host(host: str) -> bool:
    """Whether a Host header names loopback, with whatever port."""
    name = host_name(host)
    if name is None:
        return False
    if name == "localhost" or name.endswith(".localhost"):
        return True
    address = _address(name)
    address = (
        getattr(address, "ipv4_mapped", None) or address
    )  # what is_loopback says of these differs by version
    return address is not None and address.is_loopback


def is_same_origin(origin: str, host: str) -> bool:
    """Whether an Origin is the server that Host names. `null` (sandboxed pages, files) is not."""
    try:
        given = urlsplit(origin)
    except ValueError:
        return False
    return given.netloc.lower() == host.lower() and given.scheme in ("http", "https")


def host_name(host: str) -> str | None:
    """The name or address in a Host header, in lower case and without brackets; None where it holds anything else."""
    found = _HOST.fullmatch(host)
    return found[1].strip("[]").lower() if found else None


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None
