"""The typed record at the end of a notebook: what it found, for machines, beside what it shows to people.

``record("gate", {...})`` in the last cell publishes it under a MIME type of our own, so that it travels inside the executed
notebook; `find_record` reads it from there. Values are JSON's types; numbers at the top level become metrics of the run.

Boundary: the record's form. Logging it is ``workbench.runs.job``'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from workbench.runs.errors import NotebookFormatError
from workbench.store import to_json, utc_now

MIME = "application/vnd.quire.record+json"


@dataclass(frozen=True, slots=True)
class Record:
    """What one run of a notebook found."""

    kind: str  # benchmark, compare, finetune, gate, …
    values: dict[str, Any]
    created_at: str

    def metrics(self) -> dict[str, float]:
        """The numbers at the top level."""
        return {
            name: float(value)
            for name, value in self.values.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }


def record(kind: str, values: Mapping[str, Any]) -> Record:
    """Publish the record of this notebook: the last cell's call. Outside a notebook it only returns it.

    Raises:
        StoreError: a value that JSON has no form for.
    """
    made = Record(kind, to_json(values), utc_now())
    try:
        from IPython import get_ipython
        from IPython.display import publish_display_data
    except ImportError:
        return made
    if get_ipython() is not None:
        data = {"kind": made.kind, "values": made.values, "created_at": made.created_at}
        publish: Any = publish_display_data
        publish({MIME: data, "text/plain": _as_text(made)})
    return made


def find_record(notebook: Mapping[str, Any]) -> Record | None:
    """The last record in an executed notebook; None when it published none. Raises NotebookFormatError."""
    found = None
    for cell in notebook.get("cells", ()):
        for output in cell.get("outputs", ()):
            found = output.get("data", {}).get(MIME, found)
    if found is None:
        return None
    try:
        return Record(str(found["kind"]), dict(found["values"]), str(found["created_at"]))
    except (LookupError, TypeError, ValueError) as error:
        raise NotebookFormatError(
            f"the notebook's record cannot be read: {error}", value=str(found)[:200]
        ) from error


def _as_text(made: Record) -> str:
    return "\n".join(
        [f"record: {made.kind}", *(f"  {name} = {value}" for name, value in made.values.items())]
    )
