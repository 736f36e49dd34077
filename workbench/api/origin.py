"""Keeps other web sites out of a server that listens on loopback without a login.

A page of any site may ask the browser to talk to 127.0.0.1, and a hostile name may resolve to it (DNS rebinding). So the
Host header must name loopback, and an Origin, which browsers send with every cross-site request that could do harm, must be
this very server. There is no CORS header anywhere.

Boundary: headers of HTTP and WebSocket requests. It is no login.
"""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from workbench.api.errors import json_response


class LoopbackOnly:
    """ASGI middleware: 403 unless Host is loopback and Origin, if any, is the same host and port."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if not is_loopback_host(host):
            reason, param = f"the Host header {host!r} is not this machine", "host"
        elif origin is not None and not is_same_origin(origin, host):
            reason, param = f"requests from the origin {origin!r} are refused", "origin"
        else:
            await self.app(scope, receive, send)
            return
        message = f"{reason}. Use http://127.0.0.1 or http://localhost with the server's port."
        body = {
            "error": {
                "message": message,
                "type": "invalid_request_error",
                "param": param,
                "code": "origin_refused",
            }
        }
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": "origin refused"})
            return
        await json_response(body, 403)(scope, receive, send)


def is_loopback_host(host: str) -> bool:
    """Whether a Host header names loopback, with whatever port."""
    name = _split(f"//{host}")
    if name is None:
        return False
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def is_same_origin(origin: str, host: str) -> bool:
    """Whether an Origin is the server that Host names. `null` (sandboxed pages, files) is not."""
    return urlsplit(origin).netloc.lower() == host.lower() and urlsplit(origin).scheme in ("http", "https")


def _split(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
