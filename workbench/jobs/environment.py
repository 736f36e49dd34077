"""The environment of child processes that run our code: the same settings, store, tracking server and packages."""

from __future__ import annotations

import os
from pathlib import Path

from workbench.settings import Settings


def child_environment(settings: Settings, **more: str) -> dict[str, str]:
    """This process's environment with `settings` in it; `workbench` is importable there whatever its working folder."""
    environment = {**os.environ, **settings.to_env(), "MLFLOW_TRACKING_URI": settings.mlflow_url}
    environment["MLFLOW_DISABLE_TELEMETRY"] = "true"
    packages = str(Path(__file__).resolve().parents[2])
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    if packages not in paths:
        environment["PYTHONPATH"] = os.pathsep.join([*paths, packages])
    return {**environment, **more}
