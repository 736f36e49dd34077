"""A server process over FakeRunner, what it takes of the machine, and a client that costs little and keeps every byte."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httptools

from workbench.ports import free_port
from workbench.settings import FAKE_MODEL, Settings

HERE = Path(__file__).parent


@dataclass(frozen=True)
class LoadServer:
    """The child process."""

    pid: int
    port: int

    def cpu_seconds(self) -> float:
        """CPU time of all its threads since its start."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident_bytes(self) -> int:
        """Its memory that no other process shares a file of: what it allocated itself."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("this system does not tell a process's memory")


@contextmanager
def run_load_server(
    home: Path, step_s: float, record_seconds: int = 600, num_blocks: int = 50_000, **settings: Any
) -> Iterator[LoadServer]:
    port = free_port("127.0.0.1")
    given = Settings(home_dir=home, port=port, follow="", demo=False, fake=True, **settings)
    root = HERE.parents[2]
    env = {**os.environ, **given.to_env(), "PYTHONPATH": str(root)}
    child = subprocess.Popen(
        [sys.executable, str(HERE / "load_server.py"), str(step_s), str(record_seconds), str(num_blocks)], env=env, cwd=root,
        stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert child.stdout is not None
    try:
        said = ""
        while json.loads(said or "{}").get("event") != "loaded":
            said = child.stdout.readline()
            assert said, "the server ended before it had a model"
        yield LoadServer(child.pid, port)
    finally:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(20)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        child.stdout.close()


@dataclass
class RawStream(asyncio.Protocol):
    """One streamed answer as it came: packets with their times. Nothing is parsed before the end."""

    request: bytes
    num_events_to_read: int | None = None  # then it hangs up; None: to the end
    packets: list[tuple[int, bytes]] = field(default_factory=list)  # time.monotonic_ns(), bytes
    sent_ns: int = 0
    done: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.sent_ns = time.monotonic_ns()
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.packets.append((time.monotonic_ns(), data))
        if self.num_events_to_read is not None and len(self.packets) > self.num_events_to_read:
            self.transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(None)


@dataclass
class Heard:
    """What a RawStream brought. `event_ns`: when each event that adds text was read."""

    status: int = 0
    text: str = ""
    event_ns: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    is_done: bool = False  # the stream's own end came


def chat_request(*, stream: bool = True, **body: object) -> bytes:
    """A request that closes its connection at the end."""
    base = {"model": FAKE_MODEL, "messages": [{"role": "user", "content": "Hello"}], "stream": stream}
    content = json.dumps({**base, **body}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: application/json"
    return f"{head}\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content


async def hear(port: int, request: bytes, num_events_to_read: int | None = None) -> RawStream:
    """Send a request and read to its end."""
    loop = asyncio.get_running_loop()
    _, stream = await loop.create_connection(
        lambda: RawStream(request, num_events_to_read), "127.0.0.1", port
    )
    await stream.done
    return stream


def parse(stream: RawStream) -> Heard:
    """Read what came, strictly: whatever is no event of the answer raises."""
    heard, now, buffer = Heard(), 0, b""

    class Body:
        def on_body(self, body: bytes) -> None:
            nonlocal buffer
            *events, buffer = (buffer + body).split(b"\n\n")
            for event in events:
                _take(heard, event.removeprefix(b"data: "), now)

    parser = httptools.HttpResponseParser(Body())
    for now, data in stream.packets:  # noqa: B007 - Body reads it
        parser.feed_data(data)
    heard.status = parser.get_status_code()
    return heard


def _take(heard: Heard, event: bytes, now_ns: int) -> None:
    if event == b"[DONE]":
        heard.is_done = True
        return
    (choice,) = json.loads(event)["choices"]
    if text := choice["delta"].get("content"):
        heard.text += text
        heard.event_ns.append(now_ns)
    heard.finish_reason = choice["finish_reason"] or heard.finish_reason
