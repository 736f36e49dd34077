"""An app process with the model that is none, for benchmarks of a real server over real sockets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from workbench import settings as settings_module
from workbench.ports import free_port
from workbench.settings import Settings

ROOT = Path(__file__).resolve().parents[3]


def settings_of(home: Path, **overrides: object) -> Settings:
    """Settings of a HOME_DIR of its own, whatever the environment says."""
    settings = Settings(
        home_dir=home.absolute(),
        port=free_port(),
        mlflow_port=free_port(),
        fake=True,
        follow="",
        demo=False,
        **overrides,
    )
    settings_module.prepare_home(settings)
    return settings


def clean_environment(settings: Settings) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("QUIRE_", "MLFLOW_"))}
    return {**kept, **settings.to_env(), "PYTHONPATH": str(ROOT)}


@contextmanager
def serving(settings: Settings) -> Iterator[str]:
    """`quire serve` with these settings, model loaded; its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "workbench.cli", "serve", "--json"], env=clean_environment(settings), cwd=settings.home_dir,
        stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        assert told["event"] == "loaded", told
        yield str(told["url"])
    finally:
        process.terminate()
        process.wait(20)
        assert process.stdout is not None
        process.stdout.close()
