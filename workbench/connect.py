"""connect(): the engine of this HOME_DIR — the running app's, or one of our own where no app runs.

The device has one owner. While the app is up, notebooks, commands and scheduled runs attach to it and its models are in
memory once; without it, the caller takes the device's lock and loads the model itself.

Boundary: the choice. What a backend does is in ``workbench.backends``. Importing this imports no torch.
"""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from workbench import settings as settings_module
from workbench.backends.protocol import BackendError
from workbench.device_lock import DeviceBusyError
from workbench.errors import ServerUnreachableError
from workbench.run_state import RunningApp, RunState
from workbench.settings import Settings

if TYPE_CHECKING:
    from workbench.backends.protocol import Backend

_START_GRACE_S = 20.0  # an app that holds the device and does not listen yet


class AppSettingsError(BackendError, ValueError):
    """Engine settings were given, and the engine is the app's."""

    code = "app_settings"


def connect(
    home_dir: str | Path | None = None, *, model: str | None = None, **engine_settings: Any
) -> Backend:
    """Attach to the running app of HOME_DIR, or load here when there is none.

    `model`: the ref that answers by default (folder, hub id, NAME/3, NAME@alias, endpoint:NAME/MODEL); None: the app's default, or the one of the
    settings. `engine_settings`: fields of EngineConfig for an engine of our own; of the app only ``deterministic`` can be asked,
    which loads the version a second time for this.

    Raises:
        DeviceBusyError: no app runs, and another process owns the device.
        AppSettingsError: an app runs, and settings were given that belong to its engine.
        NotReadyError, ServerUnreachableError: the app has no model, or does not answer.
        ConfigError, ModelLoadError: of an engine of our own.
    """
    settings = settings_module.load(home_dir=None if home_dir is None else Path(home_dir))
    if model is not None and model.startswith("endpoint:"):
        return _endpoint(settings, model, engine_settings)
    state = RunState(settings.run_dir)
    app = state.read()
    if app is None:
        try:
            return _local(settings, model, engine_settings)
        except DeviceBusyError as error:
            app = _app_that_starts(state) if error.address else None  # it takes the device before it listens
            if app is None:
                raise
    return _attach(app, model, engine_settings)


def _endpoint(settings: Settings, model: str, engine_settings: dict[str, Any]) -> Backend:
    from workbench.backends.by_id import open_endpoint

    if engine_settings:
        raise AppSettingsError(
            f"{model} has an engine of its own; {', '.join(sorted(engine_settings))} cannot be set from here",
            value=sorted(engine_settings), param=sorted(engine_settings)[0], remedy="Leave them out.",
        )  # fmt: skip
    return open_endpoint(model, settings)


def _local(settings: Settings, model: str | None, engine_settings: dict[str, Any]) -> Backend:
    from workbench.backends.local import LocalBackend

    return LocalBackend(settings, model=model, **engine_settings)


def _attach(app: RunningApp, model: str | None, engine_settings: dict[str, Any]) -> Backend:
    from workbench.backends.app import AppBackend

    deterministic = bool(engine_settings.pop("deterministic", False))
    if engine_settings:
        raise AppSettingsError(
            f"the app at {app.url} has an engine already; {', '.join(sorted(engine_settings))} cannot be set from here",
            value=sorted(engine_settings), limit=["deterministic"], param=sorted(engine_settings)[0],
            remedy="Set them where the app is started (QUIRE_…), or stop the app, or use another HOME_DIR.",
        )  # fmt: skip
    return AppBackend(app, model=model, deterministic=deterministic)


def _app_that_starts(state: RunState) -> RunningApp | None:
    """The app that may be about to listen; None when none does in time."""
    deadline = time.monotonic() + _START_GRACE_S
    while time.monotonic() < deadline:
        with contextlib.suppress(ServerUnreachableError):
            app = state.read()
            if app is not None:
                return app
        time.sleep(0.2)
    return None


class _CallableModule(ModuleType):
    """Importing this module makes it the package's attribute `connect`: it must answer as the function would."""

    def __call__(
        self, home_dir: str | Path | None = None, *, model: str | None = None, **engine_settings: Any
    ) -> Backend:
        return connect(home_dir, model=model, **engine_settings)


sys.modules[__name__].__class__ = _CallableModule
