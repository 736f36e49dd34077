"""RequestLog: every request that an engine ended, on the disk, off the hot path.

The engine thread makes one small dictionary a request and puts it into a queue; a writer thread appends to a journal (JSON
lines), syncs it every half second and turns full journals into Parquet files under ``HOME_DIR/requests/``. What was written
to the journal survives SIGKILL of the process; journals that a killed process left become Parquet files at the next start.
An answer can be held back until its row is written: see `expect`.

Texts are kept only when the setting says so: ``off``, ``redacted`` (before the write, never after) or ``full``. They come
from whoever has them (the API) by `add_text`; an engine's records hold none.

The queue is bounded for the case that the disk is full or hangs: rows are then dropped, counted, and told in the log and in
`status()`. Otherwise it does not overflow: a row costs the engine thread 5 µs and the writer 30 µs (2.5 GHz Xeon, November 2026).

Boundary: requests. Steps stay in the engine's record log; traces and their export are not made here.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal

from workbench.observe import request_reader, segments
from workbench.observe.errors import RequestLogError
from workbench.observe.request_row import failed_row, row_of
from workbench.observe.request_writer import RequestText, RequestWriter, Rotation
from workbench.observe.ticket import Ticket

if TYPE_CHECKING:
    import pandas as pd

    from engine.records import EngineEvent, RequestRecord, StepRecord

TextPolicy = Literal["off", "redacted", "full"]
TEXT_POLICIES: tuple[TextPolicy, ...] = ("off", "redacted", "full")
MAX_QUEUED = 100_000  # about 100 MB of rows
MAX_SEGMENT_ROWS = 5_000


@dataclass(frozen=True, slots=True)
class RequestLogStatus:
    """How the log is."""

    num_written: int  # requests on the journal since the start
    num_dropped: int  # lost because the queue was full; 0 unless the disk refused for long
    num_queued: int
    error: str | None  # why the last write failed; None: it did not
    folder: Path
    text: TextPolicy


class RequestLog:
    """The log of one HOME_DIR, written by this process. `sink` makes what an engine worker tells its requests to.

    `text`: what is kept of prompts and outputs. A journal of `max_segment_rows` becomes a Parquet file, sooner when it is
    large or old. Journals of dead processes are taken over in the background. Thread-safe.

    Raises:
        RequestLogError: an unknown text policy, or the folder cannot be written.
    """

    def __init__(
        self,
        home_dir: Path,
        *,
        text: TextPolicy = "off",
        max_queued: int = MAX_QUEUED,
        max_segment_rows: int = MAX_SEGMENT_ROWS,
    ) -> None:
        if text not in TEXT_POLICIES:
            raise RequestLogError(
                f"request text {text!r} is not a policy", value=text, limit=TEXT_POLICIES, param="QUIRE_REQUEST_TEXT",
                remedy=f"Set QUIRE_REQUEST_TEXT to one of {', '.join(TEXT_POLICIES)}.",
            )  # fmt: skip
        self.text: TextPolicy = text
        self.folder = segments.folder_of(home_dir)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestLogError(
                f"the request log's folder cannot be made: {error}", value=str(self.folder), param="HOME_DIR",
                remedy="Make HOME_DIR writable.",
            ) from error  # fmt: skip
        self.max_queued = max_queued
        self.max_segment_rows = max_segment_rows
        self.queue: SimpleQueue[dict[str, Any] | RequestText | Rotation | None] = SimpleQueue()
        self.num_dropped = 0
        self._tickets: weakref.WeakValueDictionary[str, Ticket] = weakref.WeakValueDictionary()
        self.on_row: Callable[[dict[str, Any]], None] | None = (
            None  # hears, in the writer's thread, of each written row
        )
        self._origins: dict[str, dict[str, str]] = {}  # of requests in flight
        self._writer = RequestWriter(self)
        self._thread = threading.Thread(target=self._writer.run, name="quire-request-log", daemon=True)
        self._thread.start()

    def sink(self, model: str, version_digest: str = "", lora: str | None = None) -> RequestSink:
        """A sink for `EngineWorker.add_sink` that names the model of what it is told.

        `lora`: the adapter that the model is (`EngineWorker.lora`): requests with another one belong to another model.
        """
        return RequestSink(self, model, version_digest, lora)

    def add_text(self, request_id: str, prompt: str | None, output: str | None) -> None:
        """Keep a request's text, as far as the policy allows; before or after the engine told of its end. Never blocks."""
        if self.text != "off":
            self.put(RequestText(request_id, prompt, output))

    def expect(self, request_id: str, origin: dict[str, str] | None = None) -> Ticket:
        """A ticket for the request's row, to be taken before it is submitted and kept until it was waited for.

        `origin`: who asks (`request_context.RequestContext.origin`), as columns of the row.
        """
        if origin:
            self._origins.setdefault(request_id, origin)
        ticket = self._tickets.get(request_id) or Ticket(
            request_id
        )  # an id in use: its second request is refused
        self._tickets[request_id] = ticket
        return ticket

    def forget(self, request_id: str, origin: dict[str, str]) -> None:
        """The request was not submitted after all. One in flight under the same id, with an origin of its own, keeps that."""
        if self._origins.get(request_id) is origin:
            self._origins.pop(request_id, None)

    def origin_of(self, request_id: str) -> dict[str, str]:
        """Who asked for a request that has ended; told once."""
        return self._origins.pop(request_id, {})

    def rotate(
        self, forget: Callable[[Mapping[str, Any]], bool] | None = None, timeout_s: float = 30.0
    ) -> bool:
        """Have all rows of ended requests on closed files, as far as the disk takes them; whether it was done in time.

        `forget`: of which rows no text is to be added any more. Not for an event loop.
        """
        order = Rotation(forget or (lambda row: False))
        self.queue.put(order)
        return order.done.wait(timeout_s) and order.is_whole

    def status(self) -> RequestLogStatus:
        """A snapshot; never waits for the writer."""
        writer = self._writer
        return RequestLogStatus(
            writer.num_written, self.num_dropped, self.queue.qsize() + len(writer.rows), writer.error,
            self.folder, self.text,
        )  # fmt: skip

    def close(self, timeout_s: float = 10.0) -> None:
        """Write what is queued, turn the journal into a Parquet file, end the thread. A second call does nothing."""
        if self._thread.is_alive():
            self.queue.put(None)
            self._thread.join(timeout_s)

    def __enter__(self) -> RequestLog:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @staticmethod
    def read(
        home_dir: Path, *, since: datetime | str | None = None, limit: int | None = None
    ) -> pd.DataFrame:
        """The logged requests of a HOME_DIR, newest first, whoever writes them now; columns of `request_row.COLUMNS`.

        `since`: only what finished then or later (UTC unless it says otherwise). `limit`: the newest so many.
        """
        frame: pd.DataFrame = request_reader.read(home_dir, since=since, limit=limit).to_pandas()
        return frame

    def put(self, item: dict[str, Any] | RequestText) -> None:
        """Queue for the writer, or count what is lost. Called on the engine thread."""
        if self.queue.qsize() < self.max_queued:
            self.queue.put(item)
        elif not isinstance(item, RequestText):
            self.num_dropped += (
                1  # one thread at a time tells a request's end; a lost text is no lost request
            )

    def row_written(self, row: dict[str, Any]) -> None:
        if self.on_row is not None:
            self.on_row(row)
        ticket = self._tickets.pop(row["request_id"], None)
        if ticket is not None:
            ticket.written_now()


class RequestSink:
    """One worker's way into the log; an ``engine.records.Sink``."""

    def __init__(
        self, request_log: RequestLog, model: str, version_digest: str, lora: str | None = None
    ) -> None:
        self._log = request_log
        self._model = model
        self._digest = version_digest
        self._lora = lora

    def on_request(self, record: RequestRecord) -> None:
        if record.lora == self._lora:
            self._log.put(row_of(record, self._model, self._digest))

    def on_event(self, event: EngineEvent) -> None:
        if event.kind == "dead":  # these requests end without a record of their own
            loras = event.loras or (None,) * len(event.request_ids)
            own = (name for name, lora in zip(event.request_ids, loras, strict=True) if lora == self._lora)
            for request_id in own:
                self._log.put(failed_row(request_id, self._model, self._digest, event.at_ns, event.message))

    def on_step(self, record: StepRecord) -> None:
        """Steps are not requests."""
