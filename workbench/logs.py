"""The process's log: one line an event on standard error, as text or as JSON, with the request that it belongs to, never with a secret.

Whoever logs only puts a record into a queue; a thread formats and writes, so that a pipe that nobody reads stops no event loop and
no engine. What that thread cannot write in time is dropped and counted.

Boundary: the root logger of our own processes. uvicorn's lines come here too: its own handlers are left out.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import logging.handlers
import queue
import sys
import threading
import traceback
from datetime import UTC, datetime
from typing import IO, Literal

from workbench.observe import request_context
from workbench.observe.redact import redact_secrets

LogFormat = Literal["text", "json"]
MAX_QUEUED = 10_000
_CLOSE_S = 1.0


def configure_logging(level: str, log_format: LogFormat = "text", stream: IO[str] | None = None) -> None:
    """Send every logger's records to `stream` (standard error), from now to the end of the process. A second call replaces it."""
    root = logging.getLogger()
    for former in [each for each in root.handlers if isinstance(each, QueuedHandler)]:
        root.removeHandler(former)
        former.close()
    handler = QueuedHandler(
        stream or sys.stderr, JsonFormatter() if log_format == "json" else TextFormatter()
    )
    root.addHandler(handler)
    root.setLevel(level.upper())
    atexit.register(handler.close)


def line_of(log_format: LogFormat, name: str, message: str, level: str = "info") -> str:
    """A message that is no log record, in the log's form: for those who print, such as the supervisor."""
    if log_format == "text":
        return message
    return _json({"time": _time(datetime.now(UTC)), "level": level, "logger": name, "message": message})


class JsonFormatter(logging.Formatter):
    """One JSON object: time (UTC), level, logger, message, and where they are known request_id and exception."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": _time(datetime.fromtimestamp(record.created, UTC)),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": getattr(record, "request_id", None),
            "exception": record.exc_text,
        }
        return _json({name: value for name, value in fields.items() if value is not None})


class TextFormatter(logging.Formatter):
    """The same for people."""

    def format(self, record: logging.LogRecord) -> str:
        request_id = getattr(record, "request_id", None)
        moment = datetime.fromtimestamp(record.created).isoformat(" ", "milliseconds")
        text = f"{moment} {record.levelname} {record.name}: {record.getMessage()}"
        text += f" [{request_id}]" if request_id else ""
        return redact_secrets(f"{text}\n{record.exc_text}" if record.exc_text else text)


class QueuedHandler(logging.handlers.QueueHandler):
    """Keeps what a record needs of the thread that made it, and hands it to a thread that writes."""

    def __init__(self, stream: IO[str], formatter: logging.Formatter) -> None:
        self.num_dropped = 0
        self._waiting: queue.Queue[logging.LogRecord] = queue.Queue(MAX_QUEUED)
        super().__init__(self._waiting)
        writer = logging.StreamHandler(stream)
        writer.setFormatter(formatter)
        self._listener: logging.handlers.QueueListener | None = logging.handlers.QueueListener(
            self._waiting, writer
        )
        self._listener.start()
        thread = self._listener._thread
        assert thread is not None
        self.thread: threading.Thread = thread

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        record.msg, record.args = record.getMessage(), None  # what it is made of may change
        if record.exc_info:
            record.exc_text = "".join(traceback.format_exception(*record.exc_info)).rstrip()
            record.exc_info = None
        record.request_id = request_context.current().request_id
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self.num_dropped += 1

    def close(self) -> None:
        """Write what waits, for at most a second. A second call does nothing."""
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(queue.Empty):
                while self._waiting.full():
                    self._waiting.get_nowait()  # nobody reads: the end must fit in
            listener.enqueue_sentinel()
            self.thread.join(_CLOSE_S)  # QueueListener.stop would wait for ever
        super().close()


def _json(fields: dict[str, str]) -> str:
    """As one line; a secret goes before the text is JSON, whose quotes would hide where it ends."""
    return json.dumps({name: redact_secrets(value) for name, value in fields.items()}, ensure_ascii=False)


def _time(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
