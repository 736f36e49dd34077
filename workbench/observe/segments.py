"""Segments of the request log: a journal while it is written, a Parquet file ever after.

A journal is a file of JSON lines that only grows; its writer holds a lock on it, so that another process knows that it is
alive. `compact` turns one into ``requests-<name>.parquet`` (written aside, synced, renamed) and only then removes the journal:
at every moment the rows are in one of the two, and where both exist the Parquet file is complete. A line is whole or it is
not there: what follows the last line end is a write that a crash cut off.

Boundary: files. Which rows there are, and when a segment ends, is `request_log`'s.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.observe.request_row import schema

if TYPE_CHECKING:
    import pyarrow as pa

JOURNAL, PARQUET = ".journal.jsonl", ".parquet"
_PREFIX = "requests-"
_ROWS_AT_ONCE = 128  # converted without giving the interpreter back


def folder_of(home_dir: Path) -> Path:
    """Where the log of a HOME_DIR is."""
    return home_dir / "requests"


class Journal:
    """The segment that is being written. One thread."""

    def __init__(self, folder: Path, name: str) -> None:
        """Make the file and hold its lock. Raises OSError."""
        self.name = name
        self.path = folder / f"{_PREFIX}{name}{JOURNAL}"
        self.num_rows = 0
        self.size = 0
        self.began = time.monotonic()
        self._dirty = False
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Hand the rows to the system: they survive this process. All of them or, with OSError, none."""
        data = b"".join(json.dumps(row, separators=(",", ":")).encode() + b"\n" for row in rows)
        try:
            written = 0
            while written < len(data):
                written += os.pwrite(self._file, data[written:], self.size + written)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self.size)
            raise
        self.size += len(data)
        self.num_rows += len(rows)
        self._dirty = True

    def sync(self) -> None:
        """Hand them to the disk: they survive the machine. Raises OSError."""
        if self._dirty:
            os.fdatasync(self._file)
            self._dirty = False

    def close(self) -> None:
        """Sync and let go of the lock; an empty journal is removed."""
        try:
            self.sync()
            if not self.num_rows:
                self.path.unlink(missing_ok=True)
        finally:
            os.close(self._file)


def new_name() -> str:
    """A segment name that sorts by time and that no other process makes."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}-{os.getpid()}"


def journals(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{_PREFIX}*{JOURNAL}"))


def parquet_files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{_PREFIX}*{PARQUET}"))


def segment_name(path: Path) -> str:
    return path.name.removeprefix(_PREFIX).removesuffix(JOURNAL).removesuffix(PARQUET)


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The journal's rows; of several with the same key the last, which knows most. Raises FileNotFoundError."""
    rows: dict[str, dict[str, Any]] = {}
    with path.open("rb") as lines:
        for line in lines:
            if not line.endswith(b"\n"):
                break  # cut off by a crash, or just being written
            try:
                row = json.loads(line)
                rows[row["row"]] = row
            except (ValueError, KeyError, TypeError):
                continue  # a disk that lost a page: one line, not the rest
    return list(rows.values())


def compact(journal: Path) -> Path | None:
    """Turn a closed journal into a Parquet file; its path, or None for an empty one. Raises OSError; the journal stays then."""
    import pyarrow.parquet as pq

    target = journal.with_name(journal.name.removesuffix(JOURNAL) + PARQUET)
    rows = read_journal(journal)
    if rows and not target.exists():
        aside = _aside(target)
        try:
            with pq.ParquetWriter(aside, schema(), compression="zstd") as writer:
                writer.write_table(to_table(rows))
            _put_in_place(aside, target)
        finally:
            aside.unlink(missing_ok=True)
    journal.unlink(missing_ok=True)
    has_rows = bool(rows)
    del rows
    _give_memory_back()
    return target if has_rows else None


def _give_memory_back() -> None:
    """To the system: the allocators would keep what a segment's rows took for the next one, minutes later."""
    import pyarrow as pa

    pa.default_memory_pool().release_unused()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def recover(folder: Path) -> list[Path]:
    """Compact the journals that dead processes left; the new files. One that is written to now is left alone."""
    made = []
    for path in journals(folder):
        with contextlib.suppress(FileNotFoundError), _if_abandoned(path) as abandoned:
            if abandoned and (file := compact(path)) is not None:
                made.append(file)
    for aside in folder.glob(f".{_PREFIX}*.tmp"):
        if time.time() - aside.stat().st_mtime > 60:  # of a process that was killed while it compacted
            aside.unlink(missing_ok=True)
    return made


@contextlib.contextmanager
def tidying(folder: Path) -> Iterator[None]:
    """Around the rewriting and removing of closed files: one process at a time. Makes the folder. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / ".tidying.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def last_finish(path: Path) -> datetime:
    """When the newest request of a Parquet file finished; the end of time where its footer does not say. Raises OSError."""
    import pyarrow.parquet as pq

    metadata = pq.read_metadata(path)
    column = schema().names.index("finished_at")
    latest = datetime.min.replace(tzinfo=UTC)
    for group in range(metadata.num_row_groups):
        statistics = metadata.row_group(group).column(column).statistics
        if statistics is None or not statistics.has_min_max:
            return datetime.max.replace(tzinfo=UTC)
        latest = max(latest, statistics.max.astimezone(UTC))
    return latest


def read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """These columns of a Parquet file, null where an older file lacks them."""
    import pyarrow.parquet as pq

    wanted = schema()
    table = pq.read_table(path, schema=wanted, columns=list(columns))
    found: list[dict[str, Any]] = table.to_pylist()
    return found


def rewrite(path: Path, columns: Sequence[str], keep: Callable[[dict[str, Any]], bool]) -> int:
    """Leave those rows of a Parquet file out that `keep`, given `columns`, says no to; how many. Within `tidying`.

    At every moment the file is the old one or the new one; it stays, empty, where nothing is left.
    """
    import pyarrow.parquet as pq

    kept = [keep(row) for row in read_rows(path, columns)]
    if all(kept):
        return 0
    table = pq.read_table(path, schema=schema()).filter(kept)
    aside = _aside(path)
    try:
        pq.write_table(table, aside, compression="zstd")
        _put_in_place(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return len(kept) - sum(kept)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file anew, so that it is the old one or the new one at every moment. Raises OSError."""
    aside = _aside(path)
    try:
        aside.write_bytes(content)
        _put_in_place(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def to_table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """Rows as a table, in small batches: the conversion holds the interpreter, which the engine's thread needs too."""
    import pyarrow as pa

    wanted = schema()
    batches = []
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        part = [_with_times(row) for row in rows[start : start + _ROWS_AT_ONCE]]
        batches.append(pa.RecordBatch.from_pylist(part, schema=wanted))
        time.sleep(0)
    return pa.Table.from_batches(batches, schema=wanted)


def _with_times(row: dict[str, Any]) -> dict[str, Any]:
    """Times of day are microseconds since 1970 in a journal."""
    timed = dict(row)
    for name in ("arrived_at", "finished_at"):
        if timed.get(name) is not None:
            timed[name] = datetime.fromtimestamp(timed[name] / 1e6, UTC)
    return timed


@contextlib.contextmanager
def _if_abandoned(path: Path) -> Iterator[bool]:
    """Whether nobody writes to the journal; its lock is held meanwhile, so that one process alone compacts it."""
    handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield path.exists()  # the process that held it may have compacted it just now
    finally:
        os.close(handle)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _put_in_place(aside: Path, target: Path) -> None:
    _sync(aside)
    os.replace(aside, target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
