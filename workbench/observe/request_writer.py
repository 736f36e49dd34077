"""The request log's writer thread: from the queue to the journal, from full journals to Parquet.

It joins texts with records, redacts, survives a disk that refuses, and counts what did not fit.

Boundary: one thread's work. What others call is `request_log`'s, files are `segments`'.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from queue import Empty
from typing import TYPE_CHECKING, Any

from workbench.observe import segments
from workbench.observe.redact import redact
from workbench.observe.segments import Journal

if TYPE_CHECKING:
    from workbench.observe.request_log import RequestLog

log = logging.getLogger(__name__)

SYNC_INTERVAL_S = 0.5
RETRY_AFTER_S = 1.0  # after a failed write
MAX_SEGMENT_BYTES = 16 * 2**20
MAX_SEGMENT_S = 600.0
_MAX_BATCH = 1_000
_MAX_UNMATCHED = 2_000  # texts that wait for their record and records that wait for their text
_WARN_EVERY_S = 60.0


@dataclass(frozen=True, slots=True)
class RequestText:
    request_id: str
    prompt: str | None
    output: str | None


@dataclass(slots=True)
class Rotation:
    """Asks for the end of the journal that is being written."""

    forget: Callable[[Mapping[str, Any]], bool]
    done: threading.Event = field(default_factory=threading.Event)
    is_whole: bool = False  # all rows that were queued before are on closed files


class RequestWriter:
    """The writer thread: from the queue to the journal, from full journals to Parquet."""

    def __init__(self, owner: RequestLog) -> None:
        self._owner = owner
        self._queue = owner.queue
        self._text = owner.text
        self.num_written = 0
        self.error: str | None = None
        self.rows: list[dict[str, Any]] = []  # taken from the queue, not yet on the journal
        self._journal: Journal | None = None
        self._rotations: list[Rotation] = []
        self._segment = segments.new_name()
        self._counter = 0
        self._texts: OrderedDict[str, RequestText] = OrderedDict()  # came before their record
        self._bare: OrderedDict[str, dict[str, Any]] = OrderedDict()  # records whose text has not come
        self._synced = time.monotonic()
        self._warned = -_WARN_EVERY_S
        self._told_dropped = 0

    def run(self) -> None:
        import pyarrow.parquet  # noqa: F401 - a tenth of a second, now rather than beside running requests

        self._guarded(lambda: segments.recover(self._owner.folder))
        closing = False
        while not closing:
            closing = self._collect()
            self._write()
            self._tell_drops()
            if self._rotations:
                self._rotate_for_others()
            if self._journal is not None and (closing or self._is_full(self._journal)):
                self._rotate()
            elif self._journal is not None and time.monotonic() - self._synced >= SYNC_INTERVAL_S:
                self._guarded(self._journal.sync)
                self._synced = time.monotonic()

    def _collect(self) -> bool:
        """Wait for something to do and take what there is; True for the last time."""
        try:
            item = self._queue.get(timeout=self._patience())
            for _ in range(_MAX_BATCH):
                if item is None:
                    return self._drain()
                self._take(item)
                item = self._queue.get_nowait()
            self._queue.put(item)  # a row more than fits; the order of rows means nothing
        except Empty:
            pass
        return False

    def _drain(self) -> bool:
        """Take the rest, at the end."""
        while not self._queue.empty():
            item = self._queue.get()
            if item is not None:
                self._take(item)
        return True

    def _patience(self) -> float | None:
        """How long the thread may sleep, s; None: until something comes."""
        if self.rows:
            return RETRY_AFTER_S
        return None if self._journal is None else SYNC_INTERVAL_S

    def _take(self, item: dict[str, Any] | RequestText | Rotation) -> None:
        if isinstance(item, Rotation):
            self._rotations.append(item)
            return
        if isinstance(item, RequestText):
            bare = self._bare.pop(item.request_id, None)
            if bare is None:
                _remember(self._texts, item.request_id, item)
            else:
                self.rows.append(bare | self._allowed(item))  # the same row again, knowing more
            return
        self._counter += 1
        origin = self._owner.origin_of(item["request_id"])
        row = {"row": f"{self._segment}-{self._counter}", **item, **_times_of_day(item), **origin}
        row["error"] = _clean(row["error"])
        text = self._texts.pop(row["request_id"], None)
        if text is not None:
            row |= self._allowed(text)
        elif self._text != "off":
            _remember(self._bare, row["request_id"], row)
        self.rows.append(row)

    def _allowed(self, text: RequestText) -> dict[str, str | None]:
        """What the policy leaves of a text, in a form that files can hold."""
        kept = {"prompt": text.prompt, "output": text.output}
        if self._text == "redacted":
            kept = {name: redact(value) if value else value for name, value in kept.items()}
        return {name: _clean(value) for name, value in kept.items()}

    def _write(self) -> None:
        if not self.rows:
            return
        rows, told = self.rows, self.error
        try:
            if self._journal is None:
                self._journal = Journal(self._owner.folder, segments.new_name())
            self._journal.append(rows)
        except OSError as error:  # disk full, quota, folder gone: they stay here and are tried again
            self.error = str(error)
            self._warn(f"the request log cannot be written, {len(rows)} requests wait: {error}")
            self._bound()
            return
        self.rows, self.error = [], None
        if told is not None:
            log.warning("the request log can be written again")
        self.num_written = self._counter
        for row in rows:
            self._owner.row_written(row)

    def _bound(self) -> None:
        """Rows that could not be written count against the queue's limit."""
        surplus = len(self.rows) - self._owner.max_queued
        if surplus > 0:
            del self.rows[:surplus]
            self._owner.num_dropped += surplus

    def _is_full(self, journal: Journal) -> bool:
        return (
            journal.num_rows >= self._owner.max_segment_rows
            or journal.size >= MAX_SEGMENT_BYTES
            or (journal.num_rows > 0 and time.monotonic() - journal.began >= MAX_SEGMENT_S)
        )

    def _rotate(self) -> None:
        journal = self._journal
        assert journal is not None
        self._journal = None
        self._guarded(journal.close)
        if journal.num_rows:
            self._guarded(lambda: segments.compact(journal.path))

    def _rotate_for_others(self) -> None:
        rotations, self._rotations = self._rotations, []
        for order in rotations:
            for request_id in [name for name, row in self._bare.items() if order.forget(row)]:
                del self._bare[request_id]
        if self._journal is not None:
            self._rotate()
        self._guarded(lambda: segments.recover(self._owner.folder))
        for order in rotations:
            order.is_whole = not self.rows
            order.done.set()

    def _guarded(self, work: Callable[[], object]) -> None:
        """Do `work`; a system that refuses leaves the journal as it is, for the next start."""
        try:
            work()
        except Exception as error:  # noqa: BLE001 - the thread's boundary: a broken file must not end the log
            self.error = f"{type(error).__name__}: {error}"
            self._warn(f"the request log could not tidy up: {self.error}")

    def _tell_drops(self) -> None:
        dropped = self._owner.num_dropped
        if dropped > self._told_dropped and self._warn(f"the request log has dropped {dropped} requests"):
            self._told_dropped = dropped

    def _warn(self, message: str) -> bool:
        if time.monotonic() - self._warned < _WARN_EVERY_S:
            return False
        self._warned = time.monotonic()
        log.warning("%s", message)
        return True


def _times_of_day(row: dict[str, Any]) -> dict[str, int | None]:
    """UTC microseconds of what happened a moment ago by the monotonic clock."""
    offset_ns = time.time_ns() - time.monotonic_ns()
    return {
        name: None if row.get(of) is None else (row[of] + offset_ns) // 1_000
        for name, of in (("arrived_at", "arrival_ns"), ("finished_at", "finished_ns"))
    }


def _clean(text: str | None) -> str | None:
    """Half a surrogate pair, which JSON lets in, fits into no file."""
    return None if text is None else text.encode("utf-8", "replace").decode()


def _remember(known: OrderedDict[str, Any], request_id: str, item: Any) -> None:
    known[request_id] = item
    if len(known) > _MAX_UNMATCHED:
        known.popitem(last=False)
