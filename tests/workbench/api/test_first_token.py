"""What the API adds to the time to first token, at one stream."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from functools import partial
from statistics import median, quantiles
from typing import Any

import pytest

from workbench.host import fake_worker

MAX_ADDED_MS = 3.0
# A timer's lateness, both ends on one machine: beyond it the machine tells of its other users (tests/workbench/bench).
QUIET_LAG_MS = 1.0
STEP_S = 0.02


def first_event_ns(server: Any, body: bytes) -> tuple[int, int]:
    """When the request was sent and when its first token was read; the answer is read to its end."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
        sent = time.monotonic_ns()
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        came = b""
        first = 0
        while data := connection.recv(65536):
            came += data
            if not first and b'"content":"' in came.replace(b'"content":""', b""):
                first = time.monotonic_ns()
    assert b"[DONE]" in came
    return sent, first


def lag_ms() -> float:
    """How late a thread is that asked to sleep for 5 ms."""
    started = time.monotonic()
    time.sleep(0.005)
    return (time.monotonic() - started - 0.005) * 1e3


@pytest.mark.alone
@pytest.mark.full
@pytest.mark.timeout(300)
def test_the_api_adds_little_to_the_first_token(serve: Any) -> None:
    """Everything but the engine's own step: sockets, parsing, template, queue, delivery, the event. One request after another.

    Held against the limit where timers between the requests say that the machine has time for us; measured again up to five
    times. The p99 is told and not asserted: it is one request of a hundred on a machine with other users.
    """
    told = []
    with serve(partial(fake_worker, delay_s=STEP_S)) as server:
        body = json.dumps(
            {
                "model": server.model,
                "messages": [{"role": "user", "content": "Hello"}],
                "max_tokens": 2,
                "stream": True,
            }
        ).encode()
        for _ in range(int(os.environ.get("QUIRE_LOAD_ROUNDS", "5"))):
            added, lags = [], []
            for _ in range(100):
                lags.append(lag_ms())
                num_before = len(server.worker.records.requests())
                sent, first = first_event_ns(server, body)
                while len(server.worker.records.requests()) == num_before:
                    threading.Event().wait(0.001)
                record = server.worker.records.requests()[-1]
                own_ns = record.first_token_ns - record.admitted_ns
                added.append((first - sent - own_ns) / 1e6)
            told.append(
                (round(median(added), 2), round(quantiles(added, n=100)[98], 2), round(median(lags), 2))
            )
            print(f"added ms: median {told[-1][0]}, p99 {told[-1][1]}; timers late by {told[-1][2]}")
            if told[-1][0] <= MAX_ADDED_MS:
                return
    assert not any(lag <= QUIET_LAG_MS for _, _, lag in told), (
        f"beyond {MAX_ADDED_MS} ms on a quiet machine: {told}"
    )
    pytest.skip(f"this machine is busy: {told}")
