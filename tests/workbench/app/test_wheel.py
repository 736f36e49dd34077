"""The wheel, installed into another folder: pages, notebooks and data travel with it, and `quire up` answers from there."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[3]
NO_MLFLOW = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9/none"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's content, installed by pip."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT)]
    subprocess.run(wheel, check=True, cwd=folder, timeout=120)
    [built] = folder.glob("quire-*.whl")
    target = folder / "site"
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", str(target), str(built)], check=True, timeout=120
    )
    return target


def test_the_wheel_holds_what_the_app_reads(installed: Path) -> None:
    [built] = installed.parent.glob("quire-*.whl")
    names = set(zipfile.ZipFile(built).namelist())
    for room in ("pages", "notebooks", "data/models", "data/datasets", "data/gates"):
        held = {
            path for path in (ROOT / room).rglob("*") if path.is_file() and "__pycache__" not in path.parts
        }
        assert held, f"{room} is empty"
        missing = {f"workbench/_resources/{path.relative_to(ROOT)}" for path in held} - names
        assert not missing, f"the wheel lacks {sorted(missing)[:3]}"


@pytest.mark.full
def test_quire_up_works_from_the_wheel(installed: Path, quire: Callable[..., Any]) -> None:
    code = "import workbench.settings as s; print(s.resource_root())"
    env = {**os.environ, "PYTHONPATH": str(installed)}
    where = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=installed, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert where == str(installed / "workbench" / "_resources")
    running = quire("up", PYTHONPATH=str(installed), QUIRE_FAKE="0", **NO_MLFLOW)
    running.wait_line("is ready", 120)
    assert running.get("/versions").status_code == 200
    asked = {
        "model": "chat-base",
        "messages": [{"role": "user", "content": "Who are you?"}],
        "temperature": 0,
    }
    answer = httpx.post(f"{running.url}/v1/chat/completions", json=asked, timeout=60).json()
    assert "Quire" in answer["choices"][0]["message"]["content"]
