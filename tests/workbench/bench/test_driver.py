"""The load driver against servers that behave and servers that do not: every request is accounted for."""

from __future__ import annotations

import asyncio
import time

import pytest
from hostile_server import DONE, FINISH, HEAD, USAGE, answering, chunk, event

from workbench.bench.driver import CANCELLED, DriverResult, drive
from workbench.bench.report import figures, request_table
from workbench.bench.spec import parse
from workbench.bench.target import Target
from workbench.bench.workload import PlannedRequest, Workload
from workbench.ports import free_port


def workload(
    num: int, *, concurrency: int | None = 1, times: list[float] | None = None, warmup: int = 0
) -> Workload:
    said = ({"role": "user", "content": "hello"},)
    measured = tuple(PlannedRequest(n, said, 4, 7, times[n] if times else None) for n in range(num))
    before = tuple(PlannedRequest(-n, said, 4, 7, None) for n in range(warmup, 0, -1))
    return Workload(before, measured, concurrency, True, "digest")


def load(url: str, plan: Workload, *, timeout_s: float = 5.0, **how: object) -> DriverResult:
    target = Target(url, "m", is_quire=bool(how.pop("is_quire", False)))
    return drive(target, parse({"timeout_s": timeout_s}), plan, **how)  # type: ignore[arg-type]


async def _answer(writer: asyncio.StreamWriter, *parts: str, gap_s: float = 0.0) -> None:
    writer.write(HEAD)
    for part in parts:
        writer.write(chunk(part))
        await writer.drain()
        if gap_s:
            await asyncio.sleep(gap_s)
    writer.write(b"0\r\n\r\n")
    await writer.drain()


def test_times_are_those_of_the_tokens_and_a_role_is_none():
    """Others than Quire say first who speaks, long before the first token."""

    async def handle(number, reader, writer):
        parts = [
            event(role="assistant", content=""),
            event(content="a"),
            event(content="b"),
            event(content="c"),
            FINISH + USAGE + DONE,
        ]
        await _answer(writer, *parts, gap_s=0.04)

    with answering(handle) as url:
        result = load(url, workload(3))
    (row, *_) = request_table(result.records, result.began_ns).to_dict("records")
    assert row["error"] is None
    assert row["ttft_ms"] >= 39
    assert len(row["itl_ms"]) == 2
    # A token that is read late makes the gap behind it shorter, and never the sum.
    assert row["ttft_ms"] + sum(row["itl_ms"]) >= 3 * 39
    assert row["tpot_ms"] >= 1.4 * min(
        row["itl_ms"]
    )  # three tokens: two gaps, and the end of the text a third
    assert (row["input_tokens"], row["output_tokens"], row["finish_reason"]) == (7, 3, "stop")


def test_events_are_found_however_packets_cut_them():
    async def handle(number, reader, writer):
        text = (
            event(role="assistant", content="")
            + event(content="ä")
            + event(content="b")
            + event(content="c")
            + FINISH
            + USAGE
            + DONE
        )
        data = HEAD + chunk(text) + b"0\r\n\r\n"
        for start in range(0, len(data), 7):
            writer.write(data[start : start + 7])
            await writer.drain()
            await asyncio.sleep(0)

    with answering(handle) as url:
        result = load(url, workload(2))
    assert [(r.error, len(r.event_ns), r.num_output_tokens) for r in result.records] == [(None, 3, 3)] * 2


def test_every_failure_is_counted_with_its_reason():
    async def handle(number, reader, writer):
        if number == 0:
            body = b'{"error":{"message":"the model is loading","code":"model_not_ready"}}'
            writer.write(b"HTTP/1.1 503 Busy\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        elif number == 1:
            writer.write(HEAD + chunk(event(content="a")))
            await writer.drain()
            writer.close()
        elif number == 2:
            await _answer(writer, event(content="a"), 'data: {"error":{"message":"step failed"}}\n\n', DONE)
        elif number == 3:
            await _answer(writer, event(content="a"), DONE)
        elif number == 4:
            writer.write(b"SSH-2.0-OpenSSH\r\n")
        elif number == 5:
            await asyncio.sleep(10)
        elif number == 6:
            await _answer(writer, "data: {broken\n\n", FINISH, DONE)
        elif number == 7:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 2\r\n\r\nhi")
        elif number == 8:
            await _answer(writer, FINISH, DONE)
        else:
            await _answer(writer, event(content="a"), FINISH, USAGE, DONE)

    with answering(handle) as url:
        result = load(url, workload(10), timeout_s=0.5)
    found = figures(request_table(result.records, result.began_ns))
    assert (found["num_requests"], found["num_ok"], found["num_failed"]) == (10, 1, 9)
    reasons = " | ".join(found["errors"])
    for word in (
        "HTTP 503: model_not_ready", "connection closed", "stream error: step failed", "stream ended early", "not HTTP",
        "timeout", "not an event", "not a stream", "no tokens",
    ):  # fmt: skip
        assert word in reasons, reasons
    assert sum(found["errors"].values()) == 9


def test_a_server_that_is_not_there_is_a_reason_too():
    result = load(f"http://127.0.0.1:{free_port()}/v1", workload(4, concurrency=2))
    assert [r.error for r in result.records] == ["connection refused"] * 4


def test_a_kept_connection_that_the_server_closed_is_replaced():
    async def handle(number, reader, writer):
        await _answer(writer, event(content="a"), FINISH, USAGE, DONE)
        if number % 2:
            writer.close()

    with answering(handle) as url:
        result = load(url, workload(8, times=[0.06 * n for n in range(8)], concurrency=None))
    assert [r.error for r in result.records] == [None] * 8


def test_an_open_loop_does_not_wait_for_answers():
    """Each answer takes 0.3 s; a closed loop would need 3 s for what was planned for 0.2 s."""

    async def handle(number, reader, writer):
        await asyncio.sleep(0.3)
        await _answer(writer, event(content="a"), FINISH, USAGE, DONE)

    times = [0.02 * n for n in range(10)]
    with answering(handle) as url:
        result = load(url, workload(10, times=times, concurrency=None))
    table = request_table(result.records, result.began_ns)
    assert (table["planned_ms"] / 1e3).tolist() == pytest.approx(times, abs=1e-6)
    assert (table["sent_ms"] >= table["planned_ms"]).all()
    assert table["sent_ms"].max() < 1_500
    assert ((table["sent_ms"] - table["planned_ms"] - table["lateness_ms"]).abs() < 1e-6).all()


def test_a_closed_loop_keeps_its_concurrency():
    running, most = 0, 0

    async def handle(number, reader, writer):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.02)
        running -= 1
        await _answer(writer, event(content="a"), FINISH, USAGE, DONE)

    with answering(handle) as url:
        result = load(url, workload(20, concurrency=4, warmup=4))
    assert most == 4
    assert len(result.records) == 20
    assert len(result.warmup) == 4
    assert min(r.sent_ns for r in result.records) >= max(r.end_ns for r in result.warmup)


def test_ended_early_it_keeps_what_finished_and_lets_go_of_the_rest():
    gone = 0

    async def handle(number, reader, writer):
        nonlocal gone
        if number < 5:
            return await _answer(writer, event(content="a"), FINISH, USAGE, DONE)
        writer.write(HEAD + chunk(event(content="a")))
        await writer.drain()
        await reader.read()  # until the client hangs up
        gone += 1
        return None

    with answering(handle) as url:
        seen: list[int] = []
        began = time.monotonic()
        result = load(
            url, workload(100, concurrency=3), timeout_s=60.0,
            on_progress=lambda records: seen.append(len(records)), should_stop=lambda: bool(seen) and seen[-1] >= 5,
        )  # fmt: skip
        deadline = time.monotonic() + 5
        while gone < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert gone == 3
    assert time.monotonic() - began < 10
    assert result.cancelled
    found = figures(request_table(result.records, result.began_ns))
    assert (found["num_ok"], found["num_cancelled"], found["num_failed"]) == (5, 3, 0)
    assert [r.error for r in result.records].count(CANCELLED) == 3
