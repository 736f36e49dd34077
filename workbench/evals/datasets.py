"""Evaluation datasets: JSONL files with one example a line, read strictly, and recorded as MLflow evaluation datasets.

    {"id": "t-0001", "messages": [{"role": "user", "content": "…"}], "expected": "…" or {…}, "tags": {"slice": "…"}, "tools": […]}

`id` and `messages` are required; `expected` only by the scorers that compare with it; every tag is a slice in comparisons.

Boundary: files and records. Nothing here calls a model.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.evals.errors import (
    DatasetEmptyError,
    DatasetFormatError,
    DatasetNotFoundError,
    RecordLostError,
)

if TYPE_CHECKING:
    from workbench.settings import Settings

FIELDS = {"id", "messages", "expected", "tags", "tools"}
ROLES = {"system", "user", "assistant", "tool"}
MERGE_ROWS = 200  # rows of one call to MLflow's store
_STORE_LOCK = threading.Lock()


@dataclass(frozen=True, slots=True)
class Example:
    """One request with what a good answer would be."""

    id: str
    messages: tuple[Mapping[str, Any], ...]
    expected: Any = None  # text, or a JSON object or list
    tags: Mapping[str, str] = ()  # type: ignore[assignment]  # a mapping once read; empty by default
    tools: tuple[Mapping[str, Any], ...] = ()

    @property
    def question(self) -> str:
        """The last user message, for people."""
        texts = [m.get("content") for m in self.messages if m.get("role") == "user"]
        return str(texts[-1]) if texts else ""


@dataclass(frozen=True, slots=True)
class Dataset:
    """Examples in the order of the file. `digest` covers what is asked and expected, not how the file is written."""

    name: str
    digest: str
    examples: tuple[Example, ...]

    def __len__(self) -> int:
        return len(self.examples)

    def sample(self, limit: int | None) -> Dataset:
        """At most `limit` examples, chosen by the hash of their ids: the same ones each time, whatever the file's order."""
        if limit is None or limit >= len(self.examples):
            return self
        ranked = sorted(self.examples, key=lambda e: hashlib.sha256(e.id.encode()).digest())[:limit]
        chosen = {example.id for example in ranked}
        kept = tuple(example for example in self.examples if example.id in chosen)
        return replace(self, examples=kept, digest=_digest(kept))

    def slices(self, min_examples: int = 1) -> dict[str, tuple[str, ...]]:
        """Example ids by ``tag=value``, for the tags that tell examples apart."""
        found: dict[str, list[str]] = {}
        for example in self.examples:
            for tag, value in example.tags.items():
                found.setdefault(f"{tag}={value}", []).append(example.id)
        return {
            name: tuple(ids)
            for name, ids in sorted(found.items())
            if min_examples <= len(ids) < len(self.examples)
        }


def load_dataset(path_or_name: str | Path, settings: Settings | None = None) -> Dataset:
    """Read a JSONL file, or the dataset of that name in ``HOME_DIR/datasets`` or among the bundled ones.

    Raises:
        DatasetNotFoundError: naming the places that were looked at.
        DatasetFormatError: naming the line and what is wrong with it; nothing of the file is used.
        DatasetEmptyError: a file without examples.
    """
    path = find_dataset(path_or_name, settings)
    examples: dict[str, Example] = {}
    first_line: dict[str, int] = {}
    for number, value in _lines(path):
        example = _example(path, number, value)
        if example.id in examples:
            raise _wrong(
                path, number, f"id {example.id!r} was already used in line {first_line[example.id]}", "id"
            )
        examples[example.id], first_line[example.id] = example, number
    if not examples:
        raise DatasetEmptyError(
            f"{path} holds no examples", value=str(path), param="dataset",
            remedy='Write one JSON object a line: {"id": …, "messages": […], "expected": …}.',
        )  # fmt: skip
    kept = tuple(examples.values())
    return Dataset(path.stem, _digest(kept), kept)


def find_dataset(path_or_name: str | Path, settings: Settings | None = None) -> Path:
    """The file of a dataset. Raises DatasetNotFoundError."""
    given = Path(path_or_name).expanduser()
    if given.is_file():
        return given
    places = [folder / f"{path_or_name}.jsonl" for folder in _folders(settings)]
    found = next((place for place in places if place.is_file()), None) if given.name == str(given) else None
    if found is None:
        names = dataset_names(settings)
        raise DatasetNotFoundError(
            f"there is no dataset {str(path_or_name)!r}", value=str(path_or_name), limit=names, param="dataset",
            remedy=f"Give a JSONL file, or one of: {', '.join(names) or 'none is here'}.",
        )  # fmt: skip
    return found


def dataset_names(settings: Settings | None = None) -> list[str]:
    """Names that `load_dataset` knows without a path."""
    return sorted({path.stem for folder in _folders(settings) for path in folder.glob("*.jsonl")})


def log_dataset(dataset: Dataset, settings: Settings) -> str:
    """Record the dataset as an MLflow evaluation dataset, once per content; its MLflow id.

    Raises:
        RegistryUnreachableError: MLflow does not answer.
        RecordLostError: the store holds fewer examples than the dataset has.
    """
    from workbench import tracking

    client = tracking.client(settings)
    experiment_id = tracking.experiment(settings, "evaluation")
    name = f"{dataset.name}-{dataset.digest[:8]}"
    with tracking.reachable(settings), current_store(client.tracking_uri):
        known = list(client.search_datasets(filter_string=f"name = '{name}'", max_results=1))
        record = known[0] if known else client.create_dataset(
            name=name, experiment_id=[experiment_id], tags={"digest": dataset.digest}
        )  # fmt: skip
        if len(record.to_df()) < len(dataset):
            for start in range(0, len(dataset), MERGE_ROWS):
                record.merge_records([_record(e) for e in dataset.examples[start : start + MERGE_ROWS]])
            saved = len(client.get_dataset(record.dataset_id).to_df())
            if saved < len(dataset):
                raise RecordLostError(
                    f"MLflow kept {saved} of {len(dataset)} examples of {name}", value=saved, limit=len(dataset),
                    remedy="Run it again: what is missing is added.",
                )  # fmt: skip
    return str(record.dataset_id)


@contextmanager
def current_store(uri: str) -> Iterator[None]:
    """MLflow's dataset objects know one store only, the process's current one: ours, for as long as this lasts."""
    import mlflow

    variable = "MLFLOW_TRACKING_URI"
    with _STORE_LOCK:
        before, environment = mlflow.get_tracking_uri(), os.environ.get(variable)
        mlflow.set_tracking_uri(uri)
        try:
            yield
        finally:
            mlflow.set_tracking_uri(before)
            if environment is None:
                os.environ.pop(variable, None)
            else:
                os.environ[variable] = environment


def _record(example: Example) -> dict[str, Any]:
    inputs: dict[str, Any] = {"id": example.id, "messages": list(example.messages)}
    if example.tools:
        inputs["tools"] = list(example.tools)
    return {"inputs": inputs, "expectations": {"expected": example.expected}, "tags": dict(example.tags)}


def _folders(settings: Settings | None) -> list[Path]:
    from workbench.settings import data_dir

    own = [settings.home_dir / "datasets"] if settings is not None else []
    return [*own, data_dir() / "datasets"]


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DatasetNotFoundError(
            f"{path} cannot be read: {error.strerror or error}", value=str(path), param="dataset"
        ) from error
    except UnicodeDecodeError as error:
        number = path.read_bytes()[: error.start].count(b"\n") + 1
        raise _wrong(path, number, "is not UTF-8 text") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line, parse_constant=_no_constant)
            except (ValueError, RecursionError) as error:
                raise _wrong(path, number, f"is not one JSON object ({error})") from error


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")


def _example(path: Path, number: int, value: Any) -> Example:
    if not isinstance(value, dict):
        raise _wrong(path, number, f"must be a JSON object, got {type(value).__name__}")
    for name in ("id", "messages"):
        if name not in value:
            raise _wrong(path, number, f"lacks the field {name!r}", name)
    unknown = sorted(set(value) - FIELDS)
    if unknown:
        raise _wrong(path, number, f"has the unknown field {unknown[0]!r}", unknown[0])
    identity = value["id"]
    if not isinstance(identity, str) or not identity:
        raise _wrong(path, number, f"id must be a text, got {identity!r}", "id")
    tags = value.get("tags", {})
    if not isinstance(tags, dict) or not all(isinstance(v, str | int | bool) for v in tags.values()):
        raise _wrong(path, number, "tags must be an object of texts", "tags")
    tools = value.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise _wrong(path, number, "tools must be a list of objects", "tools")
    return Example(
        identity,
        _messages(path, number, value["messages"]),
        _expected(path, number, value.get("expected")),
        {str(name): str(tag) for name, tag in tags.items()},
        tuple(tools),
    )


def _expected(path: Path, number: int, value: Any) -> Any:
    if value is None or isinstance(value, str | dict | list):
        return value
    raise _wrong(path, number, f"expected must be a text, an object or a list, got {value!r}", "expected")


def _messages(path: Path, number: int, value: Any) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(value, list) or not value:
        raise _wrong(path, number, "messages must be a list with at least one message", "messages")
    for message in value:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise _wrong(path, number, f"each message needs a role of {', '.join(sorted(ROLES))}", "messages")
        if message.get("content") is None and not message.get("tool_calls"):
            raise _wrong(path, number, "each message needs content", "messages")
    return tuple(value)


def _wrong(path: Path, number: int, what: str, param: str = "dataset") -> DatasetFormatError:
    return DatasetFormatError(
        f"{path.name}, line {number}: {what}", value=number, param=param, limit=sorted(FIELDS),
        remedy='One JSON object a line: {"id": …, "messages": […], "expected": …, "tags": {…}}.',
    )  # fmt: skip


def _digest(examples: tuple[Example, ...]) -> str:
    digest = hashlib.sha256()
    for e in examples:
        content = [e.id, list(e.messages), e.expected, dict(e.tags), list(e.tools)]
        digest.update(json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode())
        digest.update(b"\n")
    return digest.hexdigest()
