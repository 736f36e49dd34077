"""AppClient: the internal routes of the running app of a HOME_DIR, over loopback, and what is resident there.

Boundary: HTTP, and the lives of models. Completions and records are `workbench.backends.app`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx

from workbench.access.client_key import authorization
from workbench.backends.wire import HttpBackend, error_of, lost
from workbench.run_state import RunningApp

TIMEOUT = httpx.Timeout(1800.0, connect=5.0)


class AppClient(HttpBackend):
    """Speaks to a running app with its token, or QUIRE_API_KEY where that is not at hand; nothing is asked before a method is called.

    Every method raises the typed error that the app answers with, and BackendLostError where it does not answer.
    """

    def __init__(self, app: RunningApp) -> None:
        super().__init__(f"app {app.url}", app.url, authorization(app.url, app.token), TIMEOUT, app.trust)

    def residents(self) -> dict[str, Any]:
        """Lists of residents and followed aliases: ``residents, loading, draining, followed``."""
        return self._get("/quire/residents")

    def pin(self, ref: str, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Make a model resident until somebody unloads it; the resident. `options`: fields of LoadOptions."""
        body = {"ref": ref, "options": dict(options or {}), "hold": False}
        found: dict[str, Any] = self._post("/quire/load", body)["resident"]
        return found

    def drop(self, model: str) -> None:
        """Let a model go, whoever had asked for it."""
        self._post("/quire/unload", {"id": model, "hold": False})

    def sleep(self, model: str, level: int = 1) -> dict[str, Any]:
        """Have a model give its device memory back; the resident. Waits for its running requests."""
        found: dict[str, Any] = self._post("/quire/sleep", {"id": model, "level": level})["resident"]
        return found

    def wake_up(self, model: str) -> dict[str, Any]:
        """Have it take requests again; the resident."""
        found: dict[str, Any] = self._post("/quire/wake_up", {"id": model})["resident"]
        return found

    def rotate_request_log(self, kind: str, subject_id: str) -> bool:
        """Have every logged request on closed files, with no more texts to come for this subject's; whether they are."""
        answer = self._post("/quire/rotate_request_log", {"kind": kind, "id": subject_id})
        return bool(answer["done"])

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._answer(lambda: self._client.post(path, json=body))

    def _get(self, path: str, **query: Any) -> dict[str, Any]:
        given = {name: value for name, value in query.items() if value is not None}
        return self._answer(lambda: self._client.get(path, params=given))

    def _answer(self, send: Any) -> dict[str, Any]:
        try:
            response: httpx.Response = send()
        except (httpx.HTTPError, RuntimeError) as error:  # RuntimeError: the client was closed
            raise lost(self.name, error) from error
        if response.status_code != 200:
            raise error_of(response, self.name)
        body: dict[str, Any] = response.json()
        return body
