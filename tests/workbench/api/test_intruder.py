"""The intruder's list, sent byte for byte to a true server, and what is not a request of its own."""

from __future__ import annotations

import json
import socket
import sys
from functools import partial
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # intruder_table

from intruder_table import DOCUMENT, HOST, Try, table, tries

from workbench.host import fake_worker

LIMIT = 1 << 20


@pytest.fixture(scope="module")
def bare(serve):
    with serve(partial(fake_worker, delay_s=0.0), max_body_bytes=LIMIT) as running:
        yield running


def send(url: str, request: bytes) -> tuple[int, bytes, bytes]:
    """Status, head and body of the answer; status 0 where there was none."""
    address = url.removeprefix("http://")
    with socket.create_connection(address.split(":"), timeout=30) as connection:
        try:
            connection.sendall(request.replace(HOST.encode(), address.encode()))
        except ConnectionError:
            pass  # refused before all of it was read
        answer = b""
        try:
            while piece := connection.recv(65536):
                answer += piece
        except ConnectionError:
            pass
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]) if head else 0, head, body


def marked(each: Try):
    """Patterns are compiled in a process of their own, which takes seconds to start."""
    marks = [pytest.mark.full] if "pattern" in each.name else []
    return pytest.param(each, id=f"{each.group}: {each.name}", marks=marks)


@pytest.mark.parametrize("each", [marked(each) for each in tries(LIMIT)])
def test_what_is_tried_is_answered_as_the_document_says(bare, each: Try):
    status, _, body = send(bare.url, each.request)
    assert status == each.status, body[:500]
    assert b"Traceback" not in body
    assert b"root:" not in body
    if each.code:
        assert json.loads(body)["error"]["code"] == each.code
    assert bare.http.get("/readyz").status_code == 200  # and nobody else noticed


def test_the_document_has_the_table():
    assert table() in DOCUMENT.read_text("utf-8"), "run `python -m tests.workbench.api.intruder_table`"
