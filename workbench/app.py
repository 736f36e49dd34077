"""The app process: pages and API on one event loop, one engine behind both. The one place where things are wired together.

`build_app` makes the ASGI app with pages, `build_api_app` the same routes without them (`quire serve`). ``python -m
workbench.app`` is the child that the supervisor runs: it may inherit its listening socket, so that a restart loses no port.

Boundary: wiring and the process's life. No route, no page, no engine logic is written here.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
import tomllib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import BaseRoute
from starlette.types import ASGIApp

from workbench import exit_codes
from workbench import settings as settings_module
from workbench.access import exposure
from workbench.api.front import front
from workbench.api.http_metrics import ObservedRequests
from workbench.api.http_protocol import BoundedHttp
from workbench.api.metrics import EngineMetrics
from workbench.api.mlflow_proxy import MlflowProxy
from workbench.api.routes import api_routes
from workbench.device_lock import DeviceLock
from workbench.errors import WorkbenchError
from workbench.guard import die_with_parent
from workbench.host import EngineHost, HostPhase, OnFatal, WorkerFactory, fake_worker
from workbench.logs import configure_logging
from workbench.model_card import ModelCard
from workbench.ports import bind
from workbench.run_state import RunState
from workbench.services import Services
from workbench.settings import Settings
from workbench.watchdog import Watchdog

if TYPE_CHECKING:
    from engine.worker import EngineWorker
    from workbench.versions.ref import ResolvedVersion

log = logging.getLogger(__name__)
_FLUSH_S = 3  # for the ends of answers to be sent, once no request runs any more
_HARD_EXIT_S = 8.0  # whatever still hangs then does not keep the process


class Announce(Protocol):
    """Hears how far the app is."""

    def __call__(self, event: str, **facts: Any) -> None: ...


@dataclass(frozen=True, slots=True)
class Wiring:
    """What one app process consists of. Without `services` it keeps no records and runs no jobs."""

    settings: Settings
    host: EngineHost
    metrics: EngineMetrics
    services: Services | None = None
    watchdog: Watchdog | None = None
    token: str = field(
        default_factory=lambda: secrets.token_urlsafe(32), repr=False
    )  # of the internal routes


def wire(
    settings: Settings, *, on_fatal: OnFatal | None = None, factory: WorkerFactory | None = None
) -> Wiring:
    """Make the parts; nothing is started. `factory` replaces the engine's own. Raises ConfigError."""
    metrics = EngineMetrics()
    services = Services(settings)
    # Without somebody who restarts what ends (`on_fatal` is how it ends), a process is not the watchdog's to end.
    watchdog = Watchdog(settings.step_timeout_seconds, owns_process=on_fatal is not None)

    def ready(card: ModelCard, worker: EngineWorker) -> None:
        metrics.watch(card, worker)
        services.attach(card, worker)
        if worker.lora is None:
            watchdog.watch(worker)
            # What start-up made lives as long as the process: a full collection that walks it holds the GIL for 50 ms.
            gc.collect()
            gc.freeze()

    def resolver(ref: str) -> ResolvedVersion:
        from workbench.versions import resolve

        return resolve(ref, settings, merged=False)

    host = EngineHost(
        settings.engine_config(),
        factory=factory or (fake_worker if settings.fake else None),
        resolver=resolver,
        enable_lora=settings.enable_lora,
        splits=settings.splits,
        on_ready=ready,
        on_closed=metrics.unwatch,
        on_fatal=on_fatal,
        audit=services.audit,
    )
    return Wiring(settings, host, metrics, services, watchdog)


def build_api_app(wiring: Wiring) -> ASGIApp:
    """The API and the probes, without pages."""
    proxy = MlflowProxy(wiring.settings.mlflow_url)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with running(wiring, proxy):
            yield

    return Starlette(routes=_routes(wiring, proxy), middleware=_front(wiring), lifespan=lifespan)


def build_app(wiring: Wiring) -> ASGIApp:
    """Pages and API. Imports Streamlit."""
    configure_streamlit(wiring.settings)
    import streamlit as st

    from workbench.ui import resources
    from workbench.ui.live_route import LiveRoute

    proxy = MlflowProxy(wiring.settings.mlflow_url)

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[dict[str, Any]]:
        async with running(wiring, proxy):
            if wiring.services is None:
                resources.provide(wiring.host)
            else:
                resources.provide(
                    wiring.host, settings=wiring.settings, jobs=wiring.services.jobs, store=wiring.services.store,
                    limits=wiring.services.limits, logins=wiring.services.logins,
                )  # fmt: skip
            threading.Thread(target=_preload, name="quire-preload", daemon=True).start()
            yield {"host": wiring.host}

    script = Path(__file__).resolve().parent / "ui" / "main.py"
    routes = [*_routes(wiring, proxy), *LiveRoute().routes()]
    app: ASGIApp = st.App(script, routes=routes, middleware=_front(wiring), lifespan=lifespan)
    return app


def _front(wiring: Wiring) -> list[Middleware]:
    """What stands before every route, the outermost first."""
    observed = Middleware(ObservedRequests, wiring.metrics.http)
    return [observed, *front(wiring.settings, wiring.services, wiring.token)]


def _routes(wiring: Wiring, proxy: MlflowProxy) -> list[BaseRoute]:
    return api_routes(
        wiring.host, wiring.settings, wiring.metrics, token=wiring.token, proxy=proxy, services=wiring.services
    )  # fmt: skip


@asynccontextmanager
async def running(wiring: Wiring, proxy: MlflowProxy) -> AsyncIterator[None]:
    """Engines, jobs and logs run while this is open; all is closed off the loop afterwards.

    The order of the end: no new work (jobs, aliases), then the engines, whose last requests are still logged, then the log.
    """
    host, services = wiring.host, wiring.services
    if services is not None:
        await asyncio.to_thread(services.open)
    host.start()
    if services is not None:
        services.start(host)
    if wiring.watchdog is not None:
        wiring.watchdog.start()
    try:
        yield
    finally:
        if wiring.watchdog is not None:
            wiring.watchdog.close()
        await proxy.aclose()
        if services is not None:
            await asyncio.to_thread(services.stop)
        await asyncio.to_thread(host.close)
        if services is not None:
            await asyncio.to_thread(services.close)


def configure_streamlit(settings: Settings) -> None:
    """Apply the project's `.streamlit/config.toml` and this process's address, wherever it was started from."""
    from streamlit.web import bootstrap

    options: dict[str, Any] = {}
    file = settings_module.resource_root() / ".streamlit" / "config.toml"
    if file.is_file():
        options.update(_flatten(tomllib.loads(file.read_text("utf-8"))))
    options.update(
        {
            "server.port": settings.port,
            "server.address": settings.host,
            "server.headless": True,
            "server.fileWatcherType": "none",  # a hot reload would make a second engine
            "browser.gatherUsageStats": False,
            "browser.serverAddress": settings.host,
            "browser.serverPort": settings.port,
        }
    )
    bootstrap.load_config_options(options)


class AppServer(uvicorn.Server):
    """uvicorn, telling when it listens, and ending for good when told to.

    Told once, it goes on listening, so that newcomers are told when to come again, until `host` has no more requests, at most
    `grace_s`. Told twice, it does not wait.
    """

    def __init__(
        self, config: uvicorn.Config, on_listening: Callable[[], None], host: EngineHost, grace_s: float
    ) -> None:
        super().__init__(config)
        self._on_listening = on_listening
        self._host = host
        self._grace_s = grace_s
        self._hurry = threading.Event()
        self.exit_code = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_listening()

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self.should_exit:
            super().handle_exit(sig, frame)
            return
        if self._host.is_stopping:
            self._hurry.set()
            return
        self._host.is_stopping = True
        hard_exit_after(self._grace_s + _HARD_EXIT_S)

        def stop() -> None:
            self._host.stop_serving(self._grace_s, self._hurry)
            super(AppServer, self).handle_exit(sig, frame)

        threading.Thread(target=stop, name="quire-stop", daemon=True).start()

    def die(self, error: BaseException) -> None:
        """The engine is dead: leave, so that the supervisor can start a new process. Any thread may call it."""
        log.error("the engine died, leaving: %s", error)
        self.exit_code = exit_codes.ENGINE_DEAD
        self.should_exit = True
        hard_exit_after(_HARD_EXIT_S, exit_codes.ENGINE_DEAD)


def serve(
    settings: Settings,
    *,
    with_ui: bool,
    listener: socket.socket,
    announce: Announce,
    factory: WorkerFactory | None = None,
) -> int:
    """Run the app on a bound socket until it is told to stop; the process's exit code.

    `announce` is called with "listening" and later "loaded" (id and title of the model) or "failed" (message).

    Raises:
        DeviceBusyError: another process has a model in memory under this HOME_DIR.
        StoreError, RequestLogError: the records of this HOME_DIR cannot be opened.
    """
    with listener, DeviceLock(settings.run_dir, settings.device_id).acquire(settings.url):
        return _serve(settings, with_ui=with_ui, listener=listener, announce=announce, factory=factory)


def _serve(
    settings: Settings,
    *,
    with_ui: bool,
    listener: socket.socket,
    announce: Announce,
    factory: WorkerFactory | None,
) -> int:
    server: AppServer

    def on_fatal(error: BaseException) -> None:
        server.die(error)

    wiring = wire(settings, on_fatal=on_fatal, factory=factory)
    # Pages first: Streamlit's imports fail where another thread is in the middle of importing pandas.
    app = build_app(wiring) if with_ui else build_api_app(wiring)
    assert wiring.services is not None
    wiring.services.open()  # here, where a typed error still reaches the caller
    run_state = RunState(settings.run_dir)

    def on_listening() -> None:
        run_state.write(
            settings.url, model=settings.model_path, token=wiring.token, certfile=settings.ssl_certfile
        )
        announce("listening")
        threading.Thread(
            target=_announce_load, args=(wiring.host, announce), name="quire-announce", daemon=True
        ).start()

    server = AppServer(
        _uvicorn_config(app, settings), on_listening, wiring.host, settings.shutdown_grace_seconds
    )
    for sig in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sig, _ignore)  # uvicorn restores and raises it again after its own clean shutdown
    try:
        server.run(sockets=[listener])
    finally:
        run_state.remove()
    return server.exit_code if server.started else exit_codes.FAILURE


def main() -> int:
    """The supervisor's child."""
    parent = os.environ.pop("QUIRE_SUPERVISOR_PID", "")
    listen_fd = os.environ.pop("QUIRE_LISTEN_FD", "")
    ready_fd = os.environ.pop("QUIRE_READY_FD", "")
    if parent:
        die_with_parent(int(parent))
    try:
        settings = settings_module.load()
        exposure.check_pages(settings)
        settings_module.prepare_home(settings)
        configure_logging(settings.log_level, settings.log_format)
        listener = socket.socket(fileno=int(listen_fd)) if listen_fd else bind(settings.host, settings.port)
        return serve(settings, with_ui=True, listener=listener, announce=_to_supervisor(ready_fd))
    except WorkbenchError as error:
        print(f"quire: {error}", file=sys.stderr)
        return exit_codes.BAD_INPUT


def hard_exit_after(seconds: float, code: int = 0) -> None:
    """End the process after `seconds` whatever still runs in it."""

    def leave() -> None:
        time.sleep(seconds)
        os._exit(code)

    threading.Thread(target=leave, name="quire-hard-exit", daemon=True).start()


def _to_supervisor(ready_fd: str) -> Announce:
    """Writes each event as a line of JSON to the supervisor's pipe; to nowhere without one."""

    def announce(event: str, **facts: Any) -> None:
        if ready_fd:
            with contextlib.suppress(OSError):
                os.write(int(ready_fd), json.dumps({"event": event, **facts}).encode() + b"\n")

    return announce


def _announce_load(host: EngineHost, announce: Announce) -> None:
    state = host.wait()
    if state.phase is HostPhase.READY:
        card = host.models()[0]
        announce("loaded", model=card.id, title=card.title)
    elif state.phase is HostPhase.FAILED:
        announce("failed", message=state.message)


def _uvicorn_config(app: ASGIApp, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,  # its lines go to the root logger, as all others
        log_level=settings.log_level,
        access_log=False,
        use_colors=False,
        server_header=False,
        lifespan="on",
        timeout_graceful_shutdown=_FLUSH_S,
        http=BoundedHttp,
        limit_concurrency=settings.max_connections,
        proxy_headers=False,  # who is believed is QUIRE_TRUSTED_PROXIES' alone
        ssl_certfile=settings.ssl_certfile,
        ssl_keyfile=settings.ssl_keyfile,
        ws="websockets-sansio",
        ws_max_size=200 * 2**20,  # Streamlit's default for messages and uploads
        ws_ping_interval=30,
        ws_ping_timeout=30,
        ws_per_message_deflate=False,
    )


def _preload() -> None:
    """Import what the first chart and table need, so that the first visitor does not wait for it."""
    try:
        import pandas  # noqa: F401
        import plotly.graph_objects  # noqa: F401
    except ImportError:
        log.warning("charts and tables cannot be imported", exc_info=True)


def _flatten(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def _ignore(signum: int, frame: Any) -> None:
    """uvicorn has handled it."""


if __name__ == "__main__":
    sys.exit(main())
