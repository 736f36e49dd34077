"""From an HTTP request to a decoded JSON body and a request id, with every refusal typed."""

from __future__ import annotations

import json
import re
import uuid
from typing import Any

from starlette.requests import Request

from workbench.access.principal import OWNER, principal_of
from workbench.api.errors import MediaTypeError
from workbench.errors import ApiError, BodyTooLargeError
from workbench.observe import request_context

MAX_DEPTH = 100  # levels; a JSON schema of people's making has a dozen
MAX_CONTAINERS = 200_000  # lists and objects; an empty one takes 56 bytes
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"', re.DOTALL)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_OPERATIONS = {  # of OpenTelemetry's gen_ai.operation.name
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}


def take_request_id(request: Request) -> str:
    """The caller's ``x-request-id`` where it is usable, else a new one; kept for error handlers, the log and traces."""
    given = request.headers.get("x-request-id", "")
    request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
    request.state.request_id = request_id
    _remember(request, request_id)
    return request_id


def _remember(request: Request, request_id: str) -> None:
    """What log lines, the request log and traces say of who asks."""
    context, principal = request_context.current(), principal_of(request.scope)
    context.request_id = request_id
    context.principal = None if principal is OWNER else principal.id
    context.operation = _OPERATIONS.get(request.url.path)
    context.traceparent = request.headers.get("traceparent")
    context.session = request.headers.get("x-session-id")


async def read_json(request: Request, max_bytes: int) -> Any:
    """The decoded body.

    Raises:
        MediaTypeError: it is not declared as JSON (which also keeps plain HTML forms of other sites out).
        BodyTooLargeError: more than `max_bytes`; reading stops there.
        ApiError: it is not JSON.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise MediaTypeError(
            f"content-type {media_type or 'missing'!r} is not accepted", value=media_type, limit="application/json",
            param="content-type", remedy="Send the header content-type: application/json.",
        )  # fmt: skip
    body = await _read(request, max_bytes)
    is_large = body.count(b"[") + body.count(b"{") > MAX_DEPTH  # counted in texts too: no more than a hint
    if is_large:
        _check_breadth(body)
    try:
        value = json.loads(body, parse_constant=_no_constant)
        if is_large:
            _check_depth(value)
        return value
    except RecursionError:
        raise _too_deep() from None
    except UnicodeDecodeError as error:
        raise ApiError(
            f"the body is not UTF-8: {error.reason} at byte {error.start}", value=error.start
        ) from None
    except json.JSONDecodeError as error:
        raise ApiError(
            f"the body is not valid JSON: {error.msg} at line {error.lineno} column {error.colno}",
            value=error.pos, limit="a JSON object", remedy="Send one JSON object.",
        ) from None  # fmt: skip
    except ValueError as error:  # numbers with too many digits
        raise ApiError(f"the body is not valid JSON: {error}") from None


def _check_breadth(body: bytes) -> None:
    """Refuse what would take many times its size in memory, before it is built."""
    if body.count(b"[") + body.count(b"{") <= MAX_CONTAINERS:
        return
    bare = _STRING.sub(b"", body)
    found = bare.count(b"[") + bare.count(b"{")
    if found > MAX_CONTAINERS:
        raise ApiError(
            f"the body holds {found} lists and objects", value=found, limit=MAX_CONTAINERS,
            remedy="Send it in several requests.",
        )  # fmt: skip


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = (
            [
                inner
                for outer in level
                for inner in (outer.values() if isinstance(outer, dict) else outer)
                if isinstance(inner, dict | list)
            ]
            if isinstance(value, dict | list)
            else []
        )
        if not level:
            return
    raise _too_deep()


def _too_deep() -> ApiError:
    return ApiError("the body is nested too deeply", limit=f"{MAX_DEPTH} levels")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


async def _read(request: Request, max_bytes: int) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise _too_large(int(declared), max_bytes)
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > max_bytes:
            raise _too_large(size, max_bytes)
        chunks.append(chunk)
    return b"".join(chunks)


def _too_large(size: int, max_bytes: int) -> BodyTooLargeError:
    return BodyTooLargeError(
        f"the body has {size} bytes or more, the limit is {max_bytes}", value=size, limit=max_bytes,
        param="QUIRE_MAX_BODY_BYTES", remedy="Send less, or raise QUIRE_MAX_BODY_BYTES on the server.",
    )  # fmt: skip
