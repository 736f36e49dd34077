"""Saved benchmarks whose figures can be worked out by hand."""

from __future__ import annotations

from dataclasses import replace

from engine.bench.record import make_record
from workbench.bench import saved, spec
from workbench.bench.driver import ClientRecord
from workbench.bench.report import figures, request_table
from workbench.bench.saved import BenchmarkRecord
from workbench.settings import Settings

MS = 1_000_000
_BLANK = ClientRecord(
    index=0, request_id="r", planned_ns=None, ready_ns=0, sent_ns=0, event_ns=(), last_ns=None, end_ns=0, status=200,
    finish_reason="length", error=None, asked_input_tokens=8, asked_output_tokens=5, num_input_tokens=8, num_cached_tokens=0,
    num_output_tokens=5,
)  # fmt: skip


def client_record(index: int, ttft_ms: int, tpot_ms: int) -> ClientRecord:
    """Sent at index · 100 ms; five tokens."""
    sent = index * 100 * MS
    events = tuple(sent + (ttft_ms + tpot_ms * n) * MS for n in range(5))
    return replace(
        _BLANK, index=index, request_id=f"r{index}", ready_ns=sent, sent_ns=sent, event_ns=events, last_ns=events[-1],
        end_ns=events[-1],
    )  # fmt: skip


def save_benchmark(
    settings: Settings, *, ttft_ms: int = 20, tpot_ms: int = 10, n: int = 40, name: str = ""
) -> BenchmarkRecord:
    """A benchmark of `n` requests with TTFT `ttft_ms` … `ttft_ms + n - 1`."""
    requests = request_table([client_record(i, ttft_ms + i, tpot_ms) for i in range(n)], 0)
    asked = spec.parse(
        {
            "model": "fake-echo",
            "requests": n,
            "concurrency": 4,
            "input_tokens": 8,
            "output_tokens": 5,
            "name": name,
        }
    )
    facts = make_record("benchmark", {})
    record = BenchmarkRecord(
        id=saved.new_id(), at=facts["at"], title=asked.title, spec=asked, cancelled=False,
        target={"url": "http://127.0.0.1:1", "model": "fake-echo", "dtype": "float32", "device": "cpu"}, plan_digest="p" * 64,
        offered_rps=None, forced_length=True, figures=figures(requests), loop_lag_ms=[], engine=None, agreement=None,
        notes=[], machine=facts["machine"], versions=facts["versions"], commit=facts["commit"],
    )  # fmt: skip
    saved.save(settings.home_dir, record, requests)
    return record
