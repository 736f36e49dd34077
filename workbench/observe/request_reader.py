"""Reading the request log: journals and Parquet files as one table, each request once, while others write.

Journals are read first and Parquet files listed after: a journal that became a Parquet file in between is found there, and
one that is there in both forms counts as Parquet. A row written twice (its text came later) counts as its fuller form.

Boundary: reads only; makes and repairs nothing.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.observe import segments
from workbench.observe.errors import RequestLogError

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)


def read(home_dir: Path, *, since: datetime | str | None = None, limit: int | None = None) -> pa.Table:
    """The logged requests, newest first.

    Raises:
        RequestLogError: `since` is no time, or `limit` is below 1.
    """
    import pyarrow as pa

    earliest = _moment(since)
    if limit is not None and limit < 1:
        raise RequestLogError(
            f"limit must be at least 1, got {limit}",
            value=limit,
            limit=1,
            param="limit",
            remedy="Give more, or none.",
        )
    folder = segments.folder_of(home_dir)
    fresh = _journal_rows(folder)
    tables = _parquet_tables(folder, earliest, limit)
    known = {path_name for path_name, _ in tables}
    tables += [(name, segments.to_table(rows)) for name, rows in fresh.items() if name not in known and rows]
    if not tables:
        return segments.to_table([])
    table = pa.concat_tables([table for _, table in tables])
    return _newest(table, earliest, limit)


def rows_of(home_dir: Path, request_id: str) -> list[dict[str, Any]]:
    """What is logged of one request, as `request_writer` writes rows; empty where it is not, or no more. Reads file by file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = segments.folder_of(home_dir)
    fresh = [
        row for rows in _journal_rows(folder).values() for row in rows if row["request_id"] == request_id
    ]
    tables = [segments.to_table(fresh)]
    for path in segments.parquet_files(folder):
        tables.append(pq.read_table(path, schema=_schema(), filters=[("request_id", "=", request_id)]))
    table = _each_once(pa.concat_tables(tables))
    for name in ("arrived_at", "finished_at"):  # microseconds, as in a journal
        table = table.set_column(table.schema.get_field_index(name), name, table[name].cast(pa.int64()))
    found: list[dict[str, Any]] = table.to_pylist()
    return found


def _journal_rows(folder: Path) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for path in segments.journals(folder):
        try:
            found[segments.segment_name(path)] = segments.read_journal(path)
        except FileNotFoundError:
            continue  # just became a Parquet file
    return found


def _parquet_tables(folder: Path, earliest: datetime | None, limit: int | None) -> list[tuple[str, pa.Table]]:
    """(segment, table) of each file; an empty table for a file that holds nothing asked for."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables: list[tuple[str, pa.Table]] = []
    spans: list[tuple[datetime, Path]] = []
    for path in segments.parquet_files(folder):
        try:
            spans.append((segments.last_finish(path), path))
        except (
            pa.ArrowException,
            OSError,
        ) as error:  # ours are whole; somebody else's file must not hide them
            log.warning("%s is left out of the request log: %s", path.name, error)
    finished: dict[str, datetime] = {}  # of what was read, to know when older files cannot matter
    for newest, path in sorted(spans, reverse=True):
        is_old = earliest is not None and newest < earliest
        is_beyond = limit is not None and len(finished) >= limit and newest < _nth(finished, limit)
        try:
            table = _schema().empty_table() if is_old or is_beyond else pq.read_table(path, schema=_schema())
        except (pa.ArrowException, OSError) as error:  # its footer is whole, its pages are not
            log.warning("%s is left out of the request log: %s", path.name, error)
            continue
        tables.append((segments.segment_name(path), table))
        if limit is not None:
            pairs = zip(table["row"].to_pylist(), table["finished_at"].to_pylist(), strict=True)
            finished |= {row: moment for row, moment in pairs if moment is not None}
    return tables


def _nth(finished: dict[str, datetime], n: int) -> datetime:
    """The finish of the n-th newest row."""
    return sorted(finished.values(), reverse=True)[n - 1]


def _newest(table: pa.Table, earliest: datetime | None, limit: int | None) -> pa.Table:
    import pyarrow as pa
    import pyarrow.compute as pc

    if earliest is not None:
        table = table.filter(
            pc.greater_equal(table["finished_at"], pa.scalar(earliest, table["finished_at"].type))
        )
    table = _each_once(table)
    order = pc.sort_indices(table, sort_keys=[("finished_at", "descending"), ("finished_ns", "descending")])
    return table.take(order if limit is None else order[:limit])


def _each_once(table: pa.Table) -> pa.Table:
    """Of rows with the same key, the one with text."""
    best: dict[str, int] = {}
    has_text = table["prompt"].is_valid().to_pylist()
    rows = table["row"].to_pylist()
    for index, row in enumerate(rows):
        if row not in best or has_text[index]:
            best[row] = index
    return table if len(best) == len(rows) else table.take(sorted(best.values()))


def _moment(since: datetime | str | None) -> datetime | None:
    if since is None:
        return None
    try:
        moment = datetime.fromisoformat(since) if isinstance(since, str) else since
    except ValueError:
        raise RequestLogError(
            f"{since!r} is no time",
            value=since,
            param="since",
            remedy="Give ISO 8601, such as 2026-01-31T12:00:00Z.",
        ) from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _schema() -> pa.Schema:
    from workbench.observe.request_row import schema

    return schema()
