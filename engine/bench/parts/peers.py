"""Peers: what else can continue prompts of this shape on this machine, in the same run, each within seconds of its own.

A peer that is a library runs in a child process (``engine.bench.parts.peer_process``) with random weights in the same shape,
after our engine has given its memory back; the child is killed when its time is over, so that no peer can hang or fail a
benchmark. A peer that is a server is asked over its OpenAI-compatible API. Whatever is not there is a row that says "absent".
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.bench.parts import session as sessions
from engine.bench.parts.peer_process import COMPILED, CONTINUOUS, STATIC, VLLM
from engine.bench.parts.report import print_table
from engine.bench.parts.session import Session
from engine.bench.parts.shapes import Shape
from engine.bench.parts.workload import Workload

PACKAGES = {STATIC: "transformers", COMPILED: "transformers", CONTINUOUS: "transformers", VLLM: "vllm"}
ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True, slots=True)
class PeerResult:
    """What a peer reached; `output_tokens_s` is None where it reached nothing, and `note` says why."""

    name: str
    output_tokens_s: float | None = None
    output_tokens: int = 0
    seconds: float | None = None
    note: str = ""

    def figures(self) -> dict[str, Any]:
        return {
            "peer": self.name, "output_tokens_s": self.output_tokens_s, "output_tokens": self.output_tokens,
            "seconds": self.seconds, "note": self.note,
        }  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a session, and --peer-seconds and --peer-url."""
    sessions.add_arguments(parser)
    parser.add_argument(
        "--peer-seconds", type=float, default=120.0, help="for each peer, its start included; 0: no peers"
    )
    parser.add_argument(
        "--peer-url", help="an OpenAI-compatible server of the same shape, such as http://host:8000"
    )


def measure_peers(
    session: Session, options: argparse.Namespace, shape: Shape, workload: Workload, names: Sequence[str]
) -> list[dict[str, Any]]:
    """Run the peers one after another, print their table; the session's budget stands still meanwhile."""
    if options.peer_seconds <= 0:
        print("peers: left out (--peer-seconds 0)")
        return []
    began = time.monotonic()
    found = [run_peer(name, session, shape, workload, options.peer_seconds) for name in names]
    if options.peer_url:
        found.append(ask_server(options.peer_url, workload, options.peer_seconds))
    else:
        found.append(PeerResult("OpenAI-compatible server", note="absent: no --peer-url"))
    session.ends_at += time.monotonic() - began
    rows = [result.figures() for result in found]
    print_table("peers", rows)
    return rows


def run_peer(name: str, session: Session, shape: Shape, workload: Workload, seconds: float) -> PeerResult:
    """One library peer in a child process."""
    if importlib.util.find_spec(PACKAGES[name]) is None:
        return PeerResult(name, note=f"absent: {PACKAGES[name]} is not installed")
    job = {
        "peer": name, "shape": shape.values, "device": str(session.device),
        "dtype": "bfloat16" if session.device.type == "cuda" else "float32", "prompts": workload.prompts,
        "output_tokens": workload.output_tokens, "seconds": seconds,
    }  # fmt: skip
    # A session of its own, so that whatever the peer started ends with it.
    with subprocess.Popen(
        [sys.executable, "-m", "engine.bench.parts.peer_process"], cwd=ROOT, text=True, start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as child:  # fmt: skip
        try:
            printed, complaints = child.communicate(json.dumps(job), timeout=seconds)
        except subprocess.TimeoutExpired:
            return PeerResult(name, note=f"stopped: not done in {seconds:g} s")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
    if child.returncode:
        last = (complaints.strip().splitlines() or ["no message"])[-1]
        return PeerResult(name, note=f"failed: {last[:200]}")
    reached = json.loads(next(line for line in reversed(printed.splitlines()) if line.startswith("{")))
    return _result(name, reached["output_tokens"], reached["seconds"], workload)


def ask_server(url: str, workload: Workload, seconds: float) -> PeerResult:
    """All requests at once to ``/v1/completions``, prompts as token ids; what is not done in time is not counted."""
    base = url.rstrip("/").removesuffix("/v1")
    ends_at = time.monotonic() + seconds
    began = time.perf_counter()

    def complete(prompt: list[int], output_tokens: int) -> int:
        body = {
            "model": model, "prompt": prompt, "max_tokens": output_tokens, "ignore_eos": True,
            "temperature": workload.temperature,
        }  # fmt: skip
        answer = _call(f"{base}/v1/completions", body, ends_at)
        return int(answer["usage"]["completion_tokens"])

    try:
        model = _call(f"{base}/v1/models", None, ends_at)["data"][0]["id"]
        began = time.perf_counter()
        with ThreadPoolExecutor(len(workload.prompts)) as pool:
            tokens = sum(pool.map(complete, workload.prompts, workload.output_tokens))
    except (OSError, KeyError, IndexError, ValueError) as error:
        answered = isinstance(error, urllib.error.HTTPError) or not isinstance(error, urllib.error.URLError)
        kind = "failed" if answered else "absent"
        return PeerResult(url, note=f"{kind}: {type(error).__name__}: {error}")
    return _result(url, tokens, time.perf_counter() - began, workload)


def _call(url: str, body: dict[str, Any] | None, ends_at: float) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=max(1.0, ends_at - time.monotonic())) as answer:
        return json.load(answer)


def _result(name: str, tokens: int, seconds: float, workload: Workload) -> PeerResult:
    asked = workload.num_output_tokens
    note = "" if tokens == asked else f"gave {tokens} of {asked} tokens"
    return PeerResult(name, tokens / seconds, tokens, seconds, note)
