"""Errors on the wire: every failure under /v1 is JSON in OpenAI's shape with a fitting status.

``{"error": {"message", "type", "param", "code"}}``. Status codes are decided here and nowhere else.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from engine.errors import (
    ConfigError,
    EngineAsleepError,
    EngineDeadError,
    EngineError,
    InvalidRequestError,
    ModelLoadError,
    ModelNotFoundError,
    OutOfMemoryError,
    QueueFullError,
    StepFailedError,
)
from workbench.access.limits import RateLimitError
from workbench.api.timeout import HEADER
from workbench.errors import ApiError, BodyTooLargeError, NotReadyError, UnknownModelError, WorkbenchError
from workbench.host import ResidentInUseError
from workbench.observe import request_context

log = logging.getLogger(__name__)
_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (BodyTooLargeError, 413),
    (ApiError, 400),
    (UnknownModelError, 404),
    (ModelNotFoundError, 404),
    (ModelLoadError, 422),
    (ConfigError, 400),
    (ResidentInUseError, 409),
    (NotReadyError, 503),
    (InvalidRequestError, 400),
    (EngineDeadError, 503),
    (EngineAsleepError, 503),
    (OutOfMemoryError, 503),
    (StepFailedError, 500),
)
_RETRY_AFTER_S = "2"
_PASSING = frozenset({"store_busy", "store_full"})  # by code: their module would bring SQLAlchemy along
_TIMEOUT = HEADER.encode()


class MediaTypeError(ApiError):
    """The body is not declared as JSON."""

    code = "unsupported_media_type"


class HeadersTooLargeError(ApiError):
    """More or larger headers, or a longer address, than any client of ours sends."""

    code = "headers_too_large"


class SlowBodyError(ApiError):
    """The body did not come in time."""

    code = "slow_body"


class UnauthorizedError(ApiError):
    """A route of this machine's own programs was called without their token."""

    code = "unauthorized"


class InvalidApiKeyError(UnauthorizedError):
    """No API key, or none that opens anything."""

    code = "invalid_api_key"


class ForbiddenError(ApiError):
    """What was asked for is not allowed here."""

    code = "forbidden"


class MissingRightError(ForbiddenError):
    """The API key is good, and does not allow this."""

    code = "missing_right"


class RequestFailedError(WorkbenchError):
    """The request was accepted and then failed in the engine."""

    code = "request_failed"


class RequestAbortedError(WorkbenchError):
    """The server ended the request, most likely because it is stopping."""

    code = "request_aborted"


class QueueTimeoutError(WorkbenchError):
    """The request waited longer for its turn than this server lets requests wait."""

    code = "queue_timeout"


class RequestTimeoutError(WorkbenchError):
    """The request had no output when the time was over that its caller gives it (``workbench.api.timeout``)."""

    code = "request_timeout"


def status_of(error: Exception) -> int:
    """The HTTP status of a typed error; 500 for everything else."""
    if isinstance(error, MediaTypeError):
        return 415
    if isinstance(error, HeadersTooLargeError):
        return 431
    if isinstance(error, SlowBodyError | RequestTimeoutError):
        return 408
    if isinstance(error, UnauthorizedError):
        return 401
    if isinstance(error, ForbiddenError):
        return 403
    if isinstance(error, QueueFullError | RateLimitError):
        return 429
    if isinstance(error, QueueTimeoutError | RequestAbortedError):
        return 503
    if isinstance(error, WorkbenchError) and error.code in _PASSING:
        return 503
    known = next((status for kind, status in _STATUS if isinstance(error, kind)), None)
    if known is None and isinstance(
        error, WorkbenchError
    ):  # another room's: the caller's mistake says so by its type
        known = 404 if isinstance(error, LookupError) else 400 if isinstance(error, ValueError) else None
    return known or 500


def as_asked(error: Exception, scope: Scope) -> Exception:
    """`error` as the caller of this request is to see it: time that he gave it himself is not the server's limit."""
    if isinstance(error, QueueTimeoutError) and any(name == _TIMEOUT for name, _ in scope["headers"]):
        return RequestTimeoutError(error.message, value=error.value, remedy="Give it more time, or none.")
    return error


def error_body(error: Exception, status: int) -> dict[str, Any]:
    """OpenAI's error object. An untyped error shows its type alone: its text may hold what is not the caller's."""
    if isinstance(error, EngineError | WorkbenchError):
        message, param, code = str(error), error.param, error.code
    else:
        message, param, code = (
            f"internal error ({type(error).__name__}); the server's log has it",
            None,
            "internal_error",
        )
    kind = "invalid_request_error" if status < 500 else "server_error"
    if status == 429:
        kind = "rate_limit_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(error: Exception, request_id: str | None = None, *, details: bool = False) -> Response:
    """The whole HTTP response of an error. `details` adds value, limit and remedy, for our own programs."""
    status = status_of(error)
    headers = {"x-request-id": request_id} if request_id else {}
    if status == 503:
        headers["retry-after"] = _RETRY_AFTER_S
    if isinstance(error, QueueFullError | RateLimitError):
        headers["retry-after"] = str(error.retry_after_s)
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    body = error_body(error, status)
    request_context.current().refusal = body["error"]["code"]
    if details and isinstance(error, EngineError | WorkbenchError):
        facts = {"value": error.value, "limit": error.limit, "remedy": error.remedy}
        body["error"].update(json.loads(json.dumps(facts, default=str)))
    return json_response(body, status, headers)


def json_response(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(
        json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace"),
        status,
        headers,
        media_type="application/json",
    )


async def on_typed_error(request: Request, error: Exception) -> Response:
    return error_response(as_asked(error, request.scope), getattr(request.state, "request_id", None))


async def on_unexpected_error(request: Request, error: Exception) -> Response:
    """The boundary: what nobody expected is logged with its cause and told without it."""
    log.error("unexpected error in %s %s", request.method, request.url.path, exc_info=error)
    return error_response(error, getattr(request.state, "request_id", None))


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Unknown paths and methods under /v1, in the same shape."""
    assert isinstance(error, HTTPException)
    path = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        message, code = f"{path} does not exist. Paths here: {', '.join(PATHS)}.", "unknown_path"
    elif error.status_code == 405:
        message, code = (
            f"{path} is not allowed. Allowed: {(error.headers or {}).get('Allow', '')}.",
            "method_not_allowed",
        )
    else:
        message, code = str(error.detail), "http_error"
    body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}
    return json_response(body, error.status_code, dict(error.headers or {}))


PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/v1/rerank",
    "/v1/score",
    "/v1/models",
    "/v1/feedback",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/rerank",
    "/v2/rerank",
    "/tokenize",
    "/detokenize",
    "/openapi.json",
    "/load",
    "/drain",
    "/resume",
)
