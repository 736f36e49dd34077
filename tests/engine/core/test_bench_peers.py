"""Peers of the GPU benchmarks: absent, failing and slow ones are rows; those that run are counted right."""

from __future__ import annotations

import importlib.util
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from engine.bench.parts import peer_process
from engine.bench.parts.peer_process import STATIC, VLLM, Job
from engine.bench.parts.peers import PACKAGES, ask_server, run_peer
from engine.bench.parts.session import Session
from engine.bench.parts.shapes import TINY
from engine.bench.parts.workload import Workload
from engine.limits import Limits

WORKLOAD = Workload("peers", [[1, 2, 3], [4, 5, 6, 7, 8]], [2, 5])
SESSION = Session(torch.device("cpu"), Limits(1e10, 1e10), True, time.monotonic() + 600)


class Completions(BaseHTTPRequestHandler):
    """Answers every completion with as many tokens as it asks for, or `most`; refuses it where that is negative."""

    most = 1000
    asked: list[dict[str, Any]]

    def do_GET(self) -> None:
        self._answer({"data": [{"id": "the-model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        if self.most < 0:
            self.send_error(400)
            return
        self._answer({"usage": {"completion_tokens": min(body["max_tokens"], self.most)}})

    def _answer(self, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[tuple[str, type[Completions]]]:
    handler = type("Handler", (Completions,), {"asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}/v1", handler
        http.shutdown()
        thread.join()


def test_a_server_gets_every_prompt_as_token_ids(server):
    url, handler = server
    result = ask_server(url, WORKLOAD, 30)
    assert result.output_tokens == 7
    assert result.note == ""
    assert result.output_tokens_s == pytest.approx(7 / result.seconds)
    asked = sorted(handler.asked, key=lambda body: body["max_tokens"])
    assert [(body["prompt"], body["max_tokens"]) for body in asked] == [([1, 2, 3], 2), ([4, 5, 6, 7, 8], 5)]
    assert all(body["ignore_eos"] and body["model"] == "the-model" for body in asked)


def test_a_server_that_stops_early_is_said_to(server):
    url, handler = server
    handler.most = 3
    assert ask_server(url, WORKLOAD, 30).note == "gave 5 of 7 tokens"


def test_a_server_that_refuses_has_failed(server):
    url, handler = server
    handler.most = -1
    assert ask_server(url, WORKLOAD, 30).note.startswith("failed: HTTPError: HTTP Error 400")


def test_a_server_that_is_not_there_is_absent():
    result = ask_server("http://127.0.0.1:9", WORKLOAD, 5)
    assert result.output_tokens_s is None
    assert result.note.startswith("absent: URLError")


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed here")
def test_a_package_that_is_not_installed_is_absent():
    result = run_peer(VLLM, SESSION, TINY, WORKLOAD, 30)
    assert (result.output_tokens_s, result.note) == (None, "absent: vllm is not installed")


def test_a_peer_that_takes_too_long_is_stopped():
    began = time.monotonic()
    result = run_peer(STATIC, SESSION, TINY, WORKLOAD, 0.5)  # less than its imports take
    assert result.note == "stopped: not done in 0.5 s"
    assert time.monotonic() - began < 30


@pytest.mark.full
def test_a_peer_in_its_process_gives_what_was_asked_for():
    result = run_peer(STATIC, SESSION, TINY, WORKLOAD, 200)
    assert (result.output_tokens, result.note) == (7, "")
    assert result.output_tokens_s > 0


def test_a_peer_that_fails_says_why(monkeypatch):
    monkeypatch.setitem(PACKAGES, "nobody", "json")  # installed everywhere, and no peer
    result = run_peer("nobody", SESSION, TINY, WORKLOAD, 200)
    assert result.output_tokens_s is None
    assert result.note == "failed: KeyError: 'nobody'"


@pytest.mark.full  # on a CPU its cache takes a share of the machine's memory and most of the time
def test_continuous_batching_counts_each_requests_own_tokens():
    job = Job("", TINY.values, "cpu", "float32", WORKLOAD.prompts, WORKLOAD.output_tokens, 200.0)
    tokens, seconds = peer_process.transformers_continuous(job)
    assert tokens == 7
    assert seconds > 0
