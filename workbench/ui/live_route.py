"""GET /live/NAME: what the live parts of a page show now, for a browser that asks again and again (``components/live.js``).

The same functions that paint a page at first answer here, so both show the same. ``have`` names the parts that the browser
has painted already: they are answered by their digest alone. Answers are made in one thread of low priority: the event loop
and the engine go first. Reads only. No address of another page or file is made of what is asked.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, cast

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from engine.errors import EngineError
from workbench.api.errors import error_response, on_unexpected_error
from workbench.errors import ApiError, WorkbenchError
from workbench.ui import pace
from workbench.ui.components import (
    engine_live,
    engine_state,
    job_bar,
    live,
    overview_live,
    time_controls,
    top_bar,
)
from workbench.ui.components.live import Query, Shown
from workbench.ui.theme import ThemeName

if TYPE_CHECKING:
    from workbench.jobs import Job
    from workbench.ui.components.engine_state import EngineView

JOBS_AGE_S = 2.0  # a query costs more than all the rest of an answer: all pages share one
MAX_MODEL_CHARS = 512
MAX_DIGESTS = 32  # more than two pages have parts: while one replaces the other, both are in the document
_VIEWS: Mapping[str, Callable[[EngineView, list[Job], Query], Shown]] = {
    "chip": lambda view, jobs, query: top_bar.shown(view, jobs),
    engine_live.NAME: engine_live.shown,
    overview_live.NAME: overview_live.shown,
}
_HEADERS = {
    "cache-control": "no-store",
    "content-encoding": "identity",  # Streamlit's middleware would compress it, on the event loop
    "x-content-type-options": "nosniff",
}


class UnknownViewError(WorkbenchError, LookupError):
    """No page has live parts of that name."""

    code = "unknown_view"


class LiveRoute:
    """The route and its thread."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "quire-live", initializer=pace.yield_to_the_engine)

    def routes(self) -> list[Route]:
        """For the app that has the pages."""
        return [Route("/live", self.get), Route("/live/{name:path}", self.get)]

    async def get(self, request: Request) -> Response:
        try:
            query, have = parsed(request.path_params.get("name", ""), request.query_params.multi_items())
            return await asyncio.get_running_loop().run_in_executor(self._thread, _answer, query, have)
        except (EngineError, WorkbenchError) as error:
            return error_response(error)
        except Exception as error:  # noqa: BLE001 - the route's boundary: logged with its cause
            return await on_unexpected_error(request, error)


def parsed(name: str, parameters: list[tuple[str, str]]) -> tuple[Query, frozenset[str]]:
    """The query, and the digests of what the browser has.

    Raises:
        UnknownViewError: no such view.
        ApiError: a parameter is unknown, is given twice, or has a value that no page sends.
    """
    if name not in _VIEWS:
        raise UnknownViewError(f"no live view {name!r}", value=name, limit=sorted(_VIEWS), param="name")
    given = dict(parameters)
    if len(given) < len(parameters) or given.keys() - {"model", "theme", "window", "have"}:
        raise ApiError("the parameters are model, theme, window and have, each at most once")
    model, theme = given.get("model"), given.get("theme", "light")
    window, have = given.get("window", "30"), given.get("have", "")
    if model is not None and len(model) > MAX_MODEL_CHARS:
        raise ApiError("the model's name is too long", limit=MAX_MODEL_CHARS, param="model")
    if theme not in ("light", "dark"):
        raise ApiError("a theme is light or dark", value=theme, param="theme")
    if window not in map(str, time_controls.WINDOWS):
        raise ApiError("no such window", value=window, limit=list(time_controls.WINDOWS), param="window")
    digests = have.split(".") if have else []
    if len(digests) > MAX_DIGESTS or not all(re.fullmatch("[0-9a-f]{16}", one) for one in digests):
        raise ApiError(f"have is at most {MAX_DIGESTS} digests with dots between them", param="have")
    return Query(name, model, cast("ThemeName", theme), int(window)), frozenset(digests)


def _answer(query: Query, have: frozenset[str]) -> Response:
    shown = _VIEWS[query.name](engine_state.read(query.model), job_bar.active(JOBS_AGE_S), query)
    html, data = _parts(shown.html, have), _parts(shown.data, have)
    body = f'{{"state":"{shown.state}","at_s":{json.dumps(shown.at_s)},"html":{html},"data":{data}}}'
    return Response(body, media_type="application/json", headers=_HEADERS)


def _parts(values: Mapping[str, Any], have: frozenset[str]) -> str:
    """JSON: by name the digest of each value, and the value unless the browser has it. Each value becomes JSON once."""
    told = []
    for name, value in values.items():
        text = json.dumps(value)
        digest = live.digest(name + text)
        told.append(f'"{name}":{{"digest":"{digest}"' + ("}" if digest in have else f',"value":{text}}}'))
    return f"{{{','.join(told)}}}"
