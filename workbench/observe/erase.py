"""Erase what is kept of a user, a session or a request: the request log, feedback, MLflow's traces, and datasets made of them.

The request log goes last: it alone says which requests were whose, so that after a crash the same command finds the rest. Each
Parquet file is the old one or the new one at every moment. Rows that the running app still holds are on a file first: it is asked to
write them out, or, where none runs, journals of dead processes become Parquet files.

What cannot be reached is named in the result: copies of traces at a collector, journals that another process still writes, texts
in answers of models that were trained on them.

Boundary: what is removed where. MLflow's part is in `erase_mlflow`; retention by age is `retention`'s.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import sqlalchemy as sa

from workbench.access import audit
from workbench.observe import segments
from workbench.observe.errors import EraseError
from workbench.observe.request_context import short_id
from workbench.store import feedback_outbox as outbox

if TYPE_CHECKING:
    from workbench.observe.erase_mlflow import MlflowRecords
    from workbench.settings import Settings
    from workbench.store import Store

Kind = Literal["user", "session", "request"]
_ANSWER_PREFIXES = ("chatcmpl-", "cmpl-", "resp_")
_COLUMNS = ("request_id", "user", "session", "principal")


@dataclass(frozen=True, slots=True)
class Subject:
    """Whose records are meant. A request's further choices (`ID-1`, …) are part of it; a user is an end user or a login."""

    kind: Kind
    id: str

    def __post_init__(self) -> None:
        if not self.id.strip():
            raise EraseError(
                f"the {self.kind} to erase has no name", value=self.id, param=self.kind,
                remedy=f"Give --{self.kind} ID.",
            )  # fmt: skip

    @property
    def key(self) -> str:
        """The id as records hold it."""
        if self.kind != "request":
            return short_id(self.id)
        plain = self.id
        for prefix in _ANSWER_PREFIXES:
            plain = plain.removeprefix(prefix)
        return plain

    def owns(self, row: Mapping[str, Any]) -> bool:
        """Whether a row of the request log is the subject's."""
        if self.kind == "user":
            return self.key in (row.get("user"), row.get("principal"))
        if self.kind == "session":
            return row.get("session") == self.key
        name, dash, number = str(row.get("request_id")).rpartition("-")
        return row.get("request_id") == self.key or (name == self.key and bool(dash) and number.isdigit())


@dataclass(slots=True)
class Erasure:
    """What was removed, or with `dry_run` would be."""

    kind: Kind
    id: str
    dry_run: bool
    requests: int = 0  # rows of the request log
    feedback: int = 0
    traces: int = 0  # of MLflow
    dataset_records: int = 0  # of MLflow's evaluation datasets
    dataset_examples: int = 0  # lines of HOME_DIR/datasets
    left: list[str] = field(default_factory=list)  # what is still there, and where

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def erase(
    settings: Settings,
    store: Store,
    subject: Subject,
    *,
    dry_run: bool = False,
    rotate: Callable[[Subject], None] | None = None,
    with_mlflow: bool = True,
) -> Erasure:
    """Remove what is the subject's; what was removed where. Killed in the middle, it is finished by doing it again.

    `rotate`: asks the process that writes the log to put all of it onto closed files; None: nobody writes it. `with_mlflow`: false
    leaves MLflow's part, which cannot be found any more once the log is erased.

    Raises:
        RegistryUnreachableError: MLflow does not answer; nothing was removed.
        StoreError, OSError: what was removed before stays removed.
    """
    done = Erasure(subject.kind, subject.id, dry_run)
    folder = segments.folder_of(settings.home_dir)
    if not dry_run:
        if rotate is not None:
            rotate(subject)
        elif folder.is_dir():
            segments.recover(folder)
    request_ids = _request_ids(folder, subject, done)
    mlflow: MlflowRecords | None = None
    if with_mlflow:  # asked first: where it does not answer, nothing is removed
        from workbench.observe.erase_mlflow import MlflowRecords

        mlflow = MlflowRecords(settings, subject, request_ids)
        done.traces, done.dataset_records = mlflow.num_traces, mlflow.num_records
    else:
        done.left.append("what MLflow has of traces and datasets")
    done.feedback = _feedback(store, subject, request_ids, dry_run=dry_run)
    done.dataset_examples = _examples(settings.home_dir / "datasets", subject, request_ids, dry_run=dry_run)
    if not dry_run:
        if mlflow is not None:
            mlflow.delete()
        with segments.tidying(folder):
            for path in segments.parquet_files(folder):
                segments.rewrite(path, _COLUMNS, lambda row: not subject.owns(row))
    if settings.otlp_endpoint:
        done.left.append(f"traces at the collector {settings.otlp_endpoint}: erase them there")
    _tell(store, done)
    return done


def _request_ids(folder: Path, subject: Subject, done: Erasure) -> set[str]:
    """Ids of the subject's requests in closed files, and in journals, which are named as left."""
    found: set[str] = set()
    for path in segments.parquet_files(folder):
        own = [row["request_id"] for row in segments.read_rows(path, _COLUMNS) if subject.owns(row)]
        done.requests += len(own)
        found.update(own)
    closed = {segments.segment_name(path) for path in segments.parquet_files(folder)}
    for path in segments.journals(folder):
        if segments.segment_name(path) in closed:
            continue  # the same rows: a crash came between
        own = [row["request_id"] for row in segments.read_journal(path) if subject.owns(row)]
        found.update(own)
        if done.dry_run:
            done.requests += len(own)
        elif own:
            done.left.append(f"{len(own)} requests in {path.name}, which is being written: erase again later")
    if subject.kind == "request":
        found.add(subject.key)
    return found


def _feedback(store: Store, subject: Subject, request_ids: set[str], *, dry_run: bool) -> int:
    """Remove feedback on the requests, and a user's own on any; how many rows."""
    with store.read() as connection:
        rows = connection.execute(sa.select(outbox.c.id, outbox.c.request_id, outbox.c.user)).all()
    ids = [
        row.id for row in rows
        if row.request_id in request_ids or (subject.kind == "user" and row.user == subject.key)
    ]  # fmt: skip
    if ids and not dry_run:
        with store.begin() as connection:
            for start in range(0, len(ids), 500):  # SQLite takes no statement of any length
                connection.execute(sa.delete(outbox).where(outbox.c.id.in_(ids[start : start + 500])))
    return len(ids)


def _examples(folder: Path, subject: Subject, request_ids: set[str], *, dry_run: bool) -> int:
    """Remove lines of own dataset files that were made of the requests; how many."""
    num_removed = 0
    for path in sorted(folder.glob("*.jsonl")):
        lines = path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if not _is_example_of(line, subject, request_ids)]
        num_removed += len(lines) - len(kept)
        if len(kept) < len(lines) and not dry_run:
            segments.replace_file(path, b"".join(kept))
    return num_removed


def _is_example_of(line: bytes, subject: Subject, request_ids: set[str]) -> bool:
    try:
        example = json.loads(line)
        return is_made_of(subject, request_ids, example.get("tags"), example.get("id"))
    except (ValueError, AttributeError):
        return False  # not an example: whoever reads the file complains


def is_made_of(subject: Subject, request_ids: set[str], tags: Any, example_id: Any) -> bool:
    """Whether an example of a dataset came from the requests: by its id, or its tags request_id, user and session."""
    tags = tags if isinstance(tags, Mapping) else {}
    named = tags.get(subject.kind) == subject.key and subject.kind != "request"
    return named or tags.get("request_id") in request_ids or example_id in request_ids


def _tell(store: Store, done: Erasure) -> None:
    """Who was erased is not written down again: a digest is enough to answer whether it was done."""
    if done.dry_run:
        return
    digest = blake2b(done.id.encode("utf-8", "replace"), digest_size=8).hexdigest()
    counts = ", ".join(
        f"{value} {name}"
        for name, value in done.as_dict().items()
        if isinstance(value, int) and name != "dry_run"
    )
    with store.begin() as connection:
        audit.write(connection, "erase", f"{done.kind} {digest}", detail=f"{counts}, {len(done.left)} left")
