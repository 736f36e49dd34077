"""What a server keeps of requests that ended: its memory after many is that after few."""

from __future__ import annotations

import asyncio
import json
import os
import random
from pathlib import Path

import pytest
from load_world import LoadServer, chat_request, hear, parse, run_load_server

FEW = int(os.environ.get("QUIRE_LOAD_FEW", "5000"))
MANY = int(os.environ.get("QUIRE_LOAD_MANY", "50000"))
AT_ONCE = 16
RECORD_SECONDS = 2
NUM_BLOCKS = 2_000  # the prefix cache is full long before the first reading
SEED = 20261121


async def ask(server: LoadServer, number: int, rng: random.Random) -> None:
    """One request of some user: most are streams to the end, some are whole answers, refused ones, and hung up on."""
    kind = rng.random()
    user = f"user {rng.randrange(200)}"
    message = [{"role": "user", "content": f"{number} " * rng.randint(1, 12)}]
    if kind < 0.1:
        stream = await hear(server.port, chat_request(user=user, temperature=-number))
        assert parse(stream).status == 400
    elif kind < 0.2:  # hangs up in the middle
        await hear(
            server.port, chat_request(user=user, messages=message, max_tokens=300), num_events_to_read=2
        )
    elif kind < 0.4:
        request = chat_request(stream=False, user=user, messages=message, max_tokens=4)
        (await hear(server.port, request)).packets.clear()
    else:
        heard = parse(await hear(server.port, chat_request(user=user, messages=message, max_tokens=4)))
        assert heard.is_done


async def ask_many(server: LoadServer, numbers: range) -> None:
    left = iter(numbers)
    rng = random.Random(SEED + numbers.start)

    async def one_after_the_other() -> None:
        for number in left:
            await ask(server, number, rng)

    await asyncio.gather(*(one_after_the_other() for _ in range(AT_ONCE)))


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_memory_after_many_requests_is_that_after_few(tmp_path: Path) -> None:
    """Within 5 %. The records that pages look back on reach as far here as few requests take: both readings have all of them."""
    with run_load_server(tmp_path, 0.0, RECORD_SECONDS, NUM_BLOCKS, request_text="full") as server:
        readings: dict[int, int] = {}
        for number in sorted({FEW, MANY, *range(FEW, MANY, max(1, (MANY - FEW) // 9))}):
            first = max(readings, default=0)
            asyncio.run(ask_many(server, range(first, number)))
            readings[number] = server.resident_bytes()
    print(json.dumps({str(n): f"{size / 2**20:.1f} MiB" for n, size in readings.items()}))
    assert readings[MANY] <= 1.05 * readings[FEW]
