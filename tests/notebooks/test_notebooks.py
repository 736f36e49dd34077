"""Every notebook of the project: one parameters cell, no outputs, logic imported from the services, a record at the end."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import nbformat
import pytest

from workbench.runs.notebooks import PARAMETERS_TAG, bundled_notebooks, read_notebook, source_of

PATHS = sorted(bundled_notebooks().glob("*.ipynb"))
MAY_IMPORT = {
    "engine", "workbench", "pandas", "numpy", "plotly", "tqdm", "torch", "IPython", "json", "pathlib", "time", "math"
}  # fmt: skip
MAX_FUNCTION_LINES = 5  # a callback that shows something; anything longer is logic


def cells_of(path: Path, kind: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == kind]


def test_the_nightly_gate_is_there() -> None:
    assert "nightly_gate" in [path.stem for path in PATHS]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_it_is_valid_and_committed_without_outputs(path: Path) -> None:
    nbformat.validate(json.loads(path.read_text("utf-8")))
    for cell in cells_of(path, "code"):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_its_parameters_can_be_read_and_say_what_they_mean(path: Path) -> None:
    notebook = read_notebook(path)  # raises unless there is exactly one cell of annotated scalars
    assert notebook.parameters
    assert [each.name for each in notebook.parameters if not each.comment] == []
    assert notebook.title != path.stem, "it opens with a heading"
    assert notebook.description


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_its_logic_is_imported_from_the_services(path: Path) -> None:
    for cell in cells_of(path, "code"):
        if PARAMETERS_TAG in cell["metadata"].get("tags", ()):
            continue
        for node in ast.walk(ast.parse(source_of(cell))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                assert name.split(".")[0] in MAY_IMPORT, f"{path.name} imports {name}"
                assert not name.startswith("workbench.ui"), f"{path.name} imports {name}"
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                assert length <= MAX_FUNCTION_LINES, f"{path.name} defines {node.name} in {length} lines"


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_it_ends_with_a_typed_record(path: Path) -> None:
    last = ast.parse(source_of(cells_of(path, "code")[-1]))
    calls = [node.func for node in ast.walk(last) if isinstance(node, ast.Call)]
    assert "record" in {call.id for call in calls if isinstance(call, ast.Name)}, (
        f"{path.name} ends without record()"
    )
