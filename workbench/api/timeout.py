"""x-request-timeout-ms: how long a request may take, counted from its arrival, on every route that runs the engine.

While it waits or reads its prompt, its end is 408; once it has output, that is its answer, with `finish_reason` "length" and
`stop_reason` "timeout". Embeddings and ratings have no part of an answer.

OpenAI's ``x-stainless-timeout`` is not heeded: it is the longest silence that a client bears, which no stream's length is, and who
gives up closes the connection, which ends the request at once.

Boundary: the header. The engine keeps the time.
"""

from __future__ import annotations

import re

from starlette.requests import Request

from engine.admission import MAX_TIMEOUT_S
from workbench.errors import ApiError

HEADER = "x-request-timeout-ms"
MAX_TIMEOUT_MS = MAX_TIMEOUT_S * 1000
_NUMBER = re.compile(r"[0-9]{1,8}")


def take_timeout(request: Request) -> float | None:
    """Seconds that the caller gives the request; None: as many as it takes.

    Raises:
        ApiError: no whole number of milliseconds from 1 to a day's.
    """
    given = request.headers.get(HEADER)
    if given is None:
        return None
    if not _NUMBER.fullmatch(given) or not 1 <= int(given) <= MAX_TIMEOUT_MS:
        raise ApiError(
            f"header {HEADER} is {given[:40]!r}", value=given[:40], limit=f"1 to {MAX_TIMEOUT_MS}", param=HEADER,
            remedy=f"Send whole milliseconds from 1 to {MAX_TIMEOUT_MS}, or leave it out.",
        )  # fmt: skip
    return int(given) / 1000
