"""/mlflow/* of the app's own port: bodies and headers as the other server sent them, both ways, whatever the method."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from workbench.host import fake_worker
from workbench.ports import free_port
from workbench.services import Services
from workbench.settings import Settings

PAGE = gzip.compress(b"<html>" + b"x" * 5000)


class Origin(BaseHTTPRequestHandler):
    """A server that tells what it was sent, and answers in the ways that a proxy can spoil."""

    protocol_version = "HTTP/1.1"
    gate = threading.Event()

    def log_message(self, *args: Any) -> None:
        """Quiet."""

    def _any(self) -> None:
        if "chunked" in self.headers.get("transfer-encoding", ""):
            body = self._read_chunks()
        else:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
        path = self.path.partition("?")[0].removeprefix("/mlflow")
        if path == "/gzip":
            self._answer(200, PAGE, {"content-type": "text/html", "content-encoding": "gzip"})
        elif path == "/moved":
            port = self.server.server_address[1]
            self._answer(302, b"", {"location": f"http://127.0.0.1:{port}/mlflow/there?a=1"})
        elif path == "/cookies":
            self.send_response(200)
            for value in ("a=1", "b=2"):
                self.send_header("set-cookie", value)
            self.send_header("content-length", "0")
            self.send_header("connection", "close, x-private")
            self.send_header("x-private", "of this connection")
            self.end_headers()
            self.close_connection = True
        elif path == "/stream":
            self._stream()
        elif path == "/cut":
            self.send_response(200)
            self.send_header("content-length", "1000")
            self.end_headers()
            self.wfile.write(b"half")
            self.close_connection = True
        else:
            told = {
                "method": self.command, "path": self.path, "headers": {k.lower(): v for k, v in self.headers.items()},
                "num_bytes": len(body), "body": body[:100].decode("latin-1"),
            }  # fmt: skip
            status = 404 if path == "/missing" else 201 if self.command == "PUT" else 200
            self._answer(status, json.dumps(told).encode(), {"content-type": "application/json"})

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_HEAD = _any

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _stream(self) -> None:
        self.send_response(200)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"5\r\nfirst\r\n")
        self.wfile.flush()
        self.gate.wait(20)  # the second piece comes only after the client has seen the first one
        self.wfile.write(b"6\r\nsecond\r\n0\r\n\r\n")

    def _read_chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body


@pytest.fixture(scope="module")
def proxied(serve: Any) -> Iterator[Any]:
    origin = ThreadingHTTPServer(("127.0.0.1", 0), Origin)
    thread = threading.Thread(target=origin.serve_forever, daemon=True)
    thread.start()
    uri = f"http://127.0.0.1:{origin.server_address[1]}/mlflow"
    try:
        with serve(partial(fake_worker, delay_s=0.0), mlflow_tracking_uri=uri) as running:
            yield running
    finally:
        origin.shutdown()
        thread.join(10)
        origin.server_close()


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_every_method_passes_with_path_query_and_body(proxied: Any, method: str) -> None:
    body = None if method in ("GET", "DELETE", "OPTIONS") else b"\x00payload\xff"
    path = "/mlflow/api/2.0/a%2Fb%20c?x=1&y=%26"
    answer = proxied.http.request(method, path, content=body, headers={"x-own": "kept"})
    assert answer.status_code == (201 if method == "PUT" else 200)
    told = answer.json()
    assert (told["method"], told["path"], told["headers"]["x-own"]) == (method, path, "kept")
    assert told["body"] == (body or b"").decode("latin-1")


def test_headers_of_one_connection_stay_on_it(proxied: Any) -> None:
    headers = {
        "connection": "keep-alive, x-mine", "x-mine": "1", "te": "trailers", "upgrade": "h2c", "keep-alive": "timeout=5",
        "proxy-authorization": "Basic eA==", "authorization": "Bearer mine",
    }  # fmt: skip
    sent = proxied.http.get("/mlflow/echo", headers=headers).json()["headers"]
    assert not {"x-mine", "te", "upgrade", "keep-alive", "proxy-authorization"} & set(sent)
    assert sent["authorization"] == "Bearer mine"
    got = proxied.http.get("/mlflow/cookies")
    assert got.headers.get_list("set-cookie") == ["a=1", "b=2"]
    assert "x-private" not in got.headers
    assert len(got.headers.get_list("date")) == 1


def test_the_other_server_sees_itself_as_host_and_origin(proxied: Any) -> None:
    target = proxied.host  # only to say that the app is there
    assert target.state().ready
    sent = proxied.http.post("/mlflow/echo", headers={"origin": proxied.url, "referer": proxied.url}).json()
    host = sent["headers"]["host"]
    assert host != proxied.url.removeprefix("http://")
    assert sent["headers"]["origin"] == f"http://{host}"
    assert sent["headers"]["x-forwarded-host"] == proxied.url.removeprefix("http://")
    assert "referer" not in sent["headers"]


def test_other_sites_and_names_are_kept_out(proxied: Any) -> None:
    for headers in ({"origin": "https://evil.example"}, {"host": "evil.example"}):
        assert proxied.http.post("/mlflow/echo", headers=headers).status_code == 403


def test_bodies_pass_as_they_were_encoded(proxied: Any) -> None:
    with proxied.http.stream("GET", "/mlflow/gzip", headers={"accept-encoding": "gzip"}) as answer:
        assert (answer.headers["content-encoding"], answer.headers["content-length"]) == (
            "gzip",
            str(len(PAGE)),
        )
        assert b"".join(answer.iter_raw()) == PAGE
    head = proxied.http.head("/mlflow/gzip")
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", str(len(PAGE)))


def test_answers_come_piece_by_piece(proxied: Any) -> None:
    Origin.gate.clear()
    with proxied.http.stream("GET", "/mlflow/stream") as answer:
        pieces = answer.iter_raw()
        assert next(pieces) == b"first"
        Origin.gate.set()
        assert b"".join(pieces) == b"second"


def test_uploads_of_any_size_are_passed_on(proxied: Any) -> None:
    size = 12 * 2**20  # more than the API's own limit, which is not MLflow's
    whole = proxied.http.put("/mlflow/artifact", content=b"z" * size).json()
    assert (whole["num_bytes"], whole["headers"]["content-length"]) == (size, str(size))
    pieces = proxied.http.put("/mlflow/artifact", content=(b"z" * 1000 for _ in range(300))).json()
    assert (pieces["num_bytes"], pieces["headers"].get("transfer-encoding")) == (300_000, "chunked")


def test_redirects_to_the_other_server_lead_back_here(proxied: Any) -> None:
    answer = proxied.http.get("/mlflow/moved")
    assert (answer.status_code, answer.headers["location"]) == (302, "/mlflow/there?a=1")
    bare = proxied.http.get("/mlflow")
    assert (bare.status_code, bare.headers["location"]) == (307, "/mlflow/")
    assert proxied.http.get("/mlflow/missing").status_code == 404


def test_an_answer_that_breaks_off_is_not_passed_as_whole(proxied: Any) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        proxied.http.get("/mlflow/cut")
    assert proxied.http.get("/mlflow/echo").status_code == 200


def test_while_it_starts_clients_get_a_typed_error_and_people_a_page_that_tries_again(serve: Any) -> None:
    uri = f"http://127.0.0.1:{free_port()}/mlflow"
    with serve(partial(fake_worker, delay_s=0.0), mlflow_tracking_uri=uri) as running:
        answer = running.http.post("/mlflow/api/2.0/mlflow/runs/create", json={})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["type"]) == (503, "mlflow_not_ready", "server_error")
        assert uri in error["message"]
        assert answer.headers["retry-after"]
        page = running.http.get("/mlflow/", headers={"accept": "text/html,*/*"})
        assert (page.status_code, page.headers["content-type"].split(";")[0]) == (503, "text/html")
        assert page.headers["refresh"]


def test_a_server_that_accepts_and_never_answers_holds_nothing_up(
    serve: Any, tmp_path: Path, fault: Any
) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as hung:
        uri = f"http://127.0.0.1:{hung.getsockname()[1]}/mlflow"
        settings = Settings(home_dir=tmp_path, mlflow_tracking_uri=uri, fake=True)
        with serve(partial(fake_worker, delay_s=0.0), services=Services(settings)) as running:
            for _ in range(3):
                with pytest.raises(httpx.ReadTimeout):
                    running.http.get("/mlflow/", timeout=0.1)
            chat = running.post(max_tokens=2)
            vote = {"request_id": chat.headers["x-request-id"], "kind": "thumbs", "value": "up"}
            voted = running.http.post("/v1/feedback", json=vote)
            ready = running.http.get("/readyz")
            assert {each.status_code for each in (chat, voted, ready)} == {200}
            begun = time.monotonic()
        assert time.monotonic() - begun < 10, "the end waits for MLflow"
    fault(
        "MLflow accepts and never answers", fails="pages under /mlflow wait; what asks the registry says that it does not answer, after 2 s",
        goes_on=f"requests, feedback ({voted.status_code}) and probes; aliases stay as they are; the app ends when it is told to",
        afterwards="feedback is in the outbox; aliases are followed again when MLflow answers",
    )  # fmt: skip


def test_a_tracking_store_without_a_server_is_named(serve: Any) -> None:
    with serve(partial(fake_worker, delay_s=0.0), mlflow_tracking_uri="sqlite:///x.db") as running:
        answer = running.http.get("/mlflow/api")
        assert answer.status_code == 503
        assert "sqlite:///x.db" in answer.json()["error"]["message"]
