"""The process's log: one JSON object a line, with the request it belongs to, without secrets, and never a wait for who reads it."""

from __future__ import annotations

import io
import json
import logging
import os
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest

from workbench import logs
from workbench.observe import request_context

SECRETS = {
    "Authorization: Bearer abcdefghijklmnop1234": "abcdefghijklmnop1234",
    '{"authorization": "Basic dXNlcjpwYXNzd29yZA=="}': "dXNlcjpwYXNzd29yZA",
    "GET /lab?token=0123456789abcdef&x=1": "0123456789abcdef",
    "api_key='q-0123456789abcdef'": "q-0123456789abcdef",
    "key sk-abcdefghijklmnop0123456789 used": "abcdefghijklmnop",
    "postgresql://quire:hunter2@db:5432/quire": "hunter2",
    "-----BEGIN PRIVATE KEY-----\nMIIEvQ\n-----END PRIVATE KEY-----": "MIIEvQ",
}


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    """As it was before."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in [each for each in root.handlers if each not in handlers]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)


def handler() -> logs.QueuedHandler:
    return next(each for each in logging.getLogger().handlers if isinstance(each, logs.QueuedHandler))


def lines_of(log_format: Any, say: Any) -> list[str]:
    stream = io.StringIO()
    logs.configure_logging("info", log_format, stream)
    say()
    handler().close()
    return stream.getvalue().splitlines()


def test_a_line_is_one_object_with_the_request_and_its_exception() -> None:
    def say() -> None:
        token = request_context.begin()
        request_context.current().request_id = "r-1"
        try:
            raise ValueError("two\nlines")
        except ValueError:
            logging.getLogger("workbench.y").exception("it failed: %s", "why")
        request_context.end(token)
        logging.getLogger("workbench.x").info("outside")
        logging.getLogger("workbench.x").debug("too much")

    inside, outside = (json.loads(line) for line in lines_of("json", say))
    assert (inside["level"], inside["logger"], inside["message"]) == (
        "error",
        "workbench.y",
        "it failed: why",
    )
    assert inside["request_id"] == "r-1"
    assert inside["exception"].startswith("Traceback")
    assert inside["exception"].endswith("ValueError: two\nlines")
    assert abs(time.time() - _seconds(inside["time"])) < 60
    assert set(outside) == {"time", "level", "logger", "message"}
    supervisor = json.loads(logs.line_of("json", "quire", "Quire has stopped."))
    assert supervisor["message"] == "Quire has stopped."
    assert set(supervisor) == set(outside)


def _seconds(text: str) -> float:
    assert text.endswith("Z")
    return datetime.fromisoformat(text).timestamp()


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_no_secret_is_written(log_format: Any) -> None:
    def say() -> None:
        for text in SECRETS:
            logging.getLogger("x").warning("%s", text)
            try:
                raise RuntimeError(text)
            except RuntimeError:
                logging.getLogger("x").exception("it failed")

    written = "\n".join(lines_of(log_format, say))
    assert "[key]" in written
    assert not [secret for secret in SECRETS.values() if secret in written]


@pytest.mark.timeout(30)
def test_a_reader_that_reads_nothing_stops_nobody(monkeypatch: Any) -> None:
    monkeypatch.setattr(logs, "MAX_QUEUED", 500)
    monkeypatch.setattr(logs, "_CLOSE_S", 0.1)
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as reader, os.fdopen(writing, "w") as pipe:
        logs.configure_logging("info", "json", pipe)
        made = handler()
        for number in range(2_000):  # the pipe holds some hundred lines
            logging.getLogger("x").info("line %d %s", number, "x" * 100)
        assert made.num_dropped > 0
        made.close()
        assert made.thread.is_alive()  # it still writes, and nobody waited for it
        os.set_blocking(reading, False)
        deadline = time.monotonic() + 10
        while made.thread.is_alive() and time.monotonic() < deadline:
            reader.read1()
        assert not made.thread.is_alive()
