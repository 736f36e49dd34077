"""AliasWatcher: what an alias names in the registry is what the engine serves, within seconds of a move.

One thread asks the registry every second, off the request path, and has the host load what has changed. A registry that
does not answer changes nothing: what is served goes on being served. Errors are logged when they begin, not at each poll.

Boundary: from the registry to the host. Loading, swapping and draining are the host's; moving an alias is ``versions``'.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from workbench.errors import NotReadyError, WorkbenchError
from workbench.model_source import alias_of

if TYPE_CHECKING:
    from workbench.host import EngineHost
    from workbench.settings import Settings

log = logging.getLogger(__name__)
POLL_S = 1.0
RETRY_S = 30.0  # after a version could not be loaded
HOLD_IDLE_S = 1800.0  # a job that was killed cannot give back what it had loaded
_TIMEOUT_S = 2.0
_ABSENT = (
    "RESOURCE_DOES_NOT_EXIST",
    "INVALID_PARAMETER_VALUE",
)  # how MLflow says that there is no such alias
Lookup = Callable[[str, str], "int | None"]


class AliasWatcher:
    """Follows `refs` (``NAME@alias``) and keeps an eye on every other alias that leads to a resident model.

    `lookup(name, alias)` gives the version, None when there is no such alias, and raises when the registry does not
    answer. `on_reachable` is called once, from the watcher's thread, when it answered for the first time.
    """

    def __init__(
        self,
        host: EngineHost,
        lookup: Lookup,
        refs: Sequence[str] = (),
        *,
        interval_s: float = POLL_S,
        on_reachable: Callable[[], None] | None = None,
    ) -> None:
        self._host = host
        self._lookup = lookup
        self._interval_s = interval_s
        self._on_reachable = on_reachable
        self._reached = False
        self._silent: str | None = None  # why the registry does not answer, as it was logged
        self._refused: dict[
            str, tuple[int, float]
        ] = {}  # alias -> version that could not be loaded, when to try again
        self._errors: dict[str, str] = {}  # alias -> why not
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        for ref in refs:
            host.follow(ref)

    def start(self) -> None:
        """Begin to watch. A second call does nothing."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="quire-aliases", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stop watching; a load under way is not waited for."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(_TIMEOUT_S + 1)

    def poll(self) -> None:
        """Ask once and bring the host up to date. Blocks while a version loads."""
        serving = self._host.known_aliases()
        followed = {each.ref for each in self._host.followed()}
        for ref in serving or {PROBE: None}:
            try:
                found = alias_of(ref)
                assert found is not None, f"{ref} is no alias"
                version = self._lookup(*found)
            except Exception as error:  # noqa: BLE001 - the registry's client raises its own, HTTP's and the database's
                self._tell_silence(error, followed)
                return
            self._tell_answer()
            self._host.note(ref, version, self._last_error(ref, version))
            if ref in followed and version is not None and version != serving[ref]:
                self._serve(ref, version)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._host.release_idle(HOLD_IDLE_S)
                self.poll()
            except Exception:
                log.exception("the alias watcher met an unexpected error")
            self._stop.wait(self._interval_s)

    def _serve(self, ref: str, version: int) -> None:
        refused = self._refused.get(ref)
        if refused is not None and refused[0] == version and time.monotonic() < refused[1]:
            return
        try:
            resident = self._host.serve(ref, version)
        except NotReadyError:
            return  # the host is closing
        except Exception as error:  # noqa: BLE001 - whatever a load raises: the former version goes on serving
            message = str(error) if isinstance(error, WorkbenchError) else f"{type(error).__name__}: {error}"
            if refused is None or refused[0] != version:
                log.warning("%s names version %d, which cannot be served: %s", ref, version, message)
            self._refused[ref] = (version, time.monotonic() + RETRY_S)
            self._errors[ref] = message
            self._host.note(ref, version, message)
            return
        self._refused.pop(ref, None)
        log.info("%s is served by %s from now on", ref, resident.id)

    def _last_error(self, ref: str, version: int | None) -> str | None:
        refused = self._refused.get(ref)
        return self._errors.get(ref) if refused is not None and refused[0] == version else None

    def _tell_answer(self) -> None:
        if self._silent is not None:
            log.info("the registry answers again")
        self._silent = None
        if not self._reached:
            self._reached = True
            if self._on_reachable is not None:
                self._on_reachable()

    def _tell_silence(self, error: Exception, followed: set[str]) -> None:
        if self._silent is None and self._reached:
            log.warning("the registry does not answer, aliases stay as they are: %s", error)
        self._silent = f"the registry does not answer ({type(error).__name__})"
        if self._reached:  # before that, it is only starting
            for each in self._host.followed():
                self._host.note(each.ref, each.registry_version, self._silent)


# Asked for when nothing is followed, to learn whether the registry answers.
PROBE = "ticket-extractor@champion"


def registry_lookup(settings: Settings) -> Lookup:
    """How to ask the registry of these settings: one HTTP request without retries, or MLflow's client for other stores.

    Without a tracking URI nobody runs a server for this process (`quire serve`): its SQLite file is read where there is one.
    """
    uri = settings.mlflow_tracking_uri
    if uri is not None and uri.startswith(("http://", "https://")):
        return _RestLookup(uri)
    return _ClientLookup(settings)


class _RestLookup:
    """MLflow's REST API. Its own client would import for seconds and retry for minutes while the server starts."""

    def __init__(self, url: str) -> None:
        self._url = f"{url.rstrip('/')}/api/2.0/mlflow/registered-models/alias"
        self._client: Any = None

    def __call__(self, name: str, alias: str) -> int | None:
        import httpx

        if self._client is None:
            self._client = httpx.Client(
                timeout=_TIMEOUT_S, trust_env=False, headers=_authorization(), auth=_login()
            )
        response = self._client.get(self._url, params={"name": name, "alias": alias})
        if response.status_code in (400, 404) and response.json().get("error_code") in _ABSENT:
            return None
        return int(response.raise_for_status().json()["model_version"]["version"])


class _ClientLookup:
    """A store that MLflow's client opens in this process (SQLite, Databricks and the like). Imports MLflow."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._client: Any = None

    def __call__(self, name: str, alias: str) -> int | None:
        own = self._settings.home_dir / "mlflow" / "mlflow.db"
        if self._settings.mlflow_tracking_uri is None and not own.is_file():
            raise FileNotFoundError(f"there is no registry yet: {own}")
        from mlflow.exceptions import MlflowException

        from workbench import tracking

        if self._client is None:
            self._client = tracking.client(self._settings)
        try:
            return int(self._client.get_model_version_by_alias(name, alias).version)
        except MlflowException as error:
            if error.error_code in _ABSENT:
                return None
            raise


def _authorization() -> dict[str, str]:
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    return {"authorization": f"Bearer {token}"} if token else {}


def _login() -> tuple[str, str] | None:
    user, password = (os.environ.get(f"MLFLOW_TRACKING_{name}") for name in ("USERNAME", "PASSWORD"))
    return (user, password) if user and password else None
