"""A HOME_DIR with notebooks of its own, its store, and MLflow's own SQLite file beside it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest

from workbench import settings as settings_module
from workbench.settings import Settings

ROOT = Path(__file__).resolve().parents[3]
RECORD = "from workbench.runs.record import record\nrecord('probe', {'total': sum(range(n)), 'note': note});"


def write_notebook(folder: Path, name: str, parameters: str, *cells: str) -> Path:
    """A notebook with a parameters cell and code cells."""
    folder.mkdir(parents=True, exist_ok=True)
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_markdown_cell(f"# About {name}\n\nWhat it is for.\n\nMore.")]
    tagged = nbformat.v4.new_code_cell(parameters)
    tagged.metadata["tags"] = ["parameters"]
    notebook.cells += [tagged, *(nbformat.v4.new_code_cell(cell) for cell in cells)]
    nbformat.write(notebook, folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


@pytest.fixture
def make_notebook(home: Path) -> Callable[..., Path]:
    """Writes a notebook into HOME_DIR/notebooks."""
    return lambda name, parameters, *cells: write_notebook(home / "notebooks", name, parameters, *cells)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith(("QUIRE_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME_DIR", str(tmp_path / "home"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("MLFLOW_PORT", "9")  # nothing listens there: the file itself is used
    write_notebook(
        tmp_path / "home" / "notebooks", "probe",
        "n: int = 3  # numbers to add\nnote: str | None = None  # shown", "print('adding', n)", RECORD,
    )  # fmt: skip
    return tmp_path / "home"


@pytest.fixture
def settings(home: Path) -> Settings:
    return settings_module.load()


@pytest.fixture
def eventually() -> Callable[..., bool]:
    def wait(condition: Callable[[], bool], timeout_s: float = 60.0) -> bool:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if condition():
                return True
            time.sleep(0.05)
        return False

    return wait
