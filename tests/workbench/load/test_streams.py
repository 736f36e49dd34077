"""Many streams at once: none loses a token or gets one out of its place; and what that costs the server.

The server is a process of its own: what the client takes is not in its figures. These are printed (``-s``) and not held against
anything: a machine that others share says little of them.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import time
from pathlib import Path

import pytest
from load_server import ANSWER
from load_world import LoadServer, RawStream, chat_request, hear, parse, run_load_server

NUM_STREAMS = int(os.environ.get("QUIRE_LOAD_STREAMS", "500"))
SECONDS = float(os.environ.get("QUIRE_LOAD_SECONDS", "60"))
STEP_S = 0.05


def own_cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def stream_many(server: LoadServer, num_streams: int, num_tokens: int) -> list[RawStream]:
    request = chat_request(max_tokens=num_tokens)
    return await asyncio.gather(*(hear(server.port, request) for _ in range(num_streams)))


def hold_whole(streams: list[RawStream], num_tokens: int) -> list[float]:
    """Every stream brought every token, in order, and its end. Returns the times between tokens, in ms."""
    gaps: list[float] = []
    for stream in streams:
        heard = parse(stream)
        assert heard.status == 200
        assert heard.text == ANSWER[:num_tokens]
        assert (heard.finish_reason, heard.is_done) == ("length", True)
        gaps += [(b - a) / 1e6 for a, b in zip(heard.event_ns, heard.event_ns[1:], strict=False)]
    return sorted(gaps)


@pytest.mark.alone
@pytest.mark.full
@pytest.mark.timeout(300)
def test_five_hundred_streams_on_two_cores(tmp_path: Path) -> None:
    num_tokens = int(SECONDS / STEP_S)
    cores = sorted(os.sched_getaffinity(0))[:2]
    with run_load_server(
        tmp_path, STEP_S, max_num_seqs=NUM_STREAMS, max_queued_requests=NUM_STREAMS
    ) as server:
        os.sched_setaffinity(server.pid, cores)
        cpu_s, own_s, started = server.cpu_seconds(), own_cpu_seconds(), time.monotonic()
        streams = asyncio.run(stream_many(server, NUM_STREAMS, num_tokens))
        wall_s = time.monotonic() - started
        cpu_s, own_s = server.cpu_seconds() - cpu_s, own_cpu_seconds() - own_s
        gaps = hold_whole(streams, num_tokens)
    shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
    report = {
        "streams": NUM_STREAMS,
        "tokens_each": num_tokens,
        "wall_s": round(wall_s, 1),
        "step_ms": STEP_S * 1e3,
        "server_cores": round(cpu_s / wall_s, 2),
        "server_us_per_token": round(1e6 * cpu_s / num_tokens / NUM_STREAMS, 1),
        "client_cores": round(own_s / wall_s, 2),
        "itl_ms": {name: round(gaps[int(share * (len(gaps) - 1))], 1) for name, share in shares.items()},
    }
    print(json.dumps(report))
