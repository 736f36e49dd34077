"""Servers in the shape of others: canned answers over real sockets, with what was asked kept."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # fleet_shapes

from fleet_shapes import Reply, Routes, Shaped

from workbench.settings import Settings


@pytest.fixture
def shaped() -> Iterator[Callable[[Routes], Shaped]]:
    """Makes servers of canned answers; all are closed after the test."""
    opened: list[ThreadingHTTPServer] = []

    def make(routes: Routes) -> Shaped:
        made = Shaped("", routes)

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                length = int(self.headers.get("content-length") or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                name = f"{self.command} {self.path}"
                made.asked.append((name, {k.lower(): v for k, v in self.headers.items()}, body))
                found = made.routes.get(name, Reply({"error": "not found"}, 404))
                if isinstance(found, list):
                    found = found.pop(0) if len(found) > 1 else found[0]
                reply = found if isinstance(found, Reply) else Reply(found)
                content = (
                    reply.body.encode() if isinstance(reply.body, str) else json.dumps(reply.body).encode()
                )
                if reply.events is not None:
                    lines = [f"data: {json.dumps(event)}\n\n" for event in reply.events]
                    content = "".join([*lines, "data: [DONE]\n\n"]).encode()
                self.send_response(reply.status)
                for header, value in {"content-length": str(len(content)), **reply.headers}.items():
                    self.send_header(header, value)
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = answer

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing on the terminal."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        opened.append(server)
        made.url = f"http://127.0.0.1:{server.server_port}"
        return made

    yield make
    for server in opened:
        server.shutdown()
        server.server_close()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def settings(home: Path) -> Settings:
    return Settings(home_dir=home)
