"""Notebooks: which there are, what they are for, and which parameters they take.

The project's own come with it (``notebooks/``); those in ``HOME_DIR/notebooks`` are the user's, and win over one of the same name.

Boundary: reading files. Nothing is executed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.runs.errors import NotebookFormatError, RunsError, UnknownNotebookError
from workbench.runs.parameters import Parameter, parse_parameters
from workbench.settings import Settings, resource_root

PARAMETERS_TAG = "parameters"


@dataclass(frozen=True, slots=True)
class Notebook:
    """One notebook that can be run."""

    name: str
    path: Path
    title: str
    description: str  # its first paragraph
    parameters: tuple[Parameter, ...]
    bundled: bool  # comes with the project
    error: RunsError | None = None  # why it cannot be run


def bundled_notebooks() -> Path:
    """The folder of the project's own notebooks."""
    return resource_root() / "notebooks"


def discover(settings: Settings) -> list[Notebook]:
    """All notebooks by name; one that cannot be run is there with its `error`."""
    found: dict[str, Notebook] = {}
    for folder, bundled in ((bundled_notebooks(), True), (settings.home_dir / "notebooks", False)):
        for path in sorted(folder.glob("*.ipynb")):
            try:
                found[path.stem] = read_notebook(path, bundled=bundled)
            except RunsError as error:
                found[path.stem] = Notebook(path.stem, path, path.stem, "", (), bundled, error)
    return [found[name] for name in sorted(found)]


def find(name: str, settings: Settings) -> Notebook:
    """The notebook of that name.

    Raises:
        UnknownNotebookError: naming those that there are.
        NotebookFormatError: it cannot be run.
    """
    every = {each.name: each for each in discover(settings)}
    found = every.get(name.removesuffix(".ipynb"))
    if found is None:
        raise UnknownNotebookError(
            f"there is no notebook {name!r}", value=name, limit=sorted(every), param="notebook",
            remedy=f"Notebooks: {', '.join(sorted(every)) or 'none'}; your own go to {settings.home_dir / 'notebooks'}.",
        )  # fmt: skip
    if found.error is not None:
        raise found.error
    return found


def read_notebook(path: Path, *, bundled: bool = False) -> Notebook:
    """Read one file. Raises NotebookFormatError."""
    try:
        content = json.loads(path.read_text("utf-8"))
        cells = [dict(cell) for cell in content["cells"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise NotebookFormatError(
            f"{path.name} is no notebook: {type(error).__name__}: {error}", value=str(path), limit="nbformat 4"
        ) from error  # fmt: skip
    tagged = [cell for cell in cells if PARAMETERS_TAG in cell.get("metadata", {}).get("tags", ())]
    if len(tagged) != 1:
        raise NotebookFormatError(
            f"{path.name} has {len(tagged)} parameters cells", value=len(tagged), limit=1,
            remedy=f"Give exactly one cell the tag {PARAMETERS_TAG!r}.",
        )  # fmt: skip
    title, description = _about(cells, path.stem)
    parameters = parse_parameters(source_of(tagged[0]), path.name)
    return Notebook(path.stem, path, title, description, parameters, bundled)


def source_of(cell: dict[str, Any]) -> str:
    """A cell's text; the format allows it in pieces."""
    source = cell.get("source", "")
    return source if isinstance(source, str) else "".join(source)


def _about(cells: list[dict[str, Any]], stem: str) -> tuple[str, str]:
    first = next((source_of(cell) for cell in cells if cell.get("cell_type") == "markdown"), "")
    heading, _, rest = first.partition("\n")
    title = heading.lstrip("# ").strip() if heading.startswith("#") else stem
    paragraph = (rest if heading.startswith("#") else first).strip().split("\n\n")[0]
    return title or stem, " ".join(paragraph.split())
