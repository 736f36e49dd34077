"""A saved benchmark as the page shows it: its record, its table of requests, and readings of both.

The SLO is the page's: any record can be judged by any SLO afterwards. No Streamlit here; figures are ``workbench.bench``'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.ui import formats, resources
from workbench.ui.readings import Reading

if TYPE_CHECKING:
    import pandas as pd

    from workbench.bench.saved import BenchmarkRecord
    from workbench.ui.resources import PageServices

BENCHMARKS = "benchmarks"  # the subject of the readings here
LATENCIES = (("ttft_ms", "TTFT"), ("tpot_ms", "TPOT"), ("itl_ms", "ITL"), ("e2e_ms", "E2E"))
QUANTILES = ("mean", "p50", "p95", "p99")
MAX_LISTED = 50
Slo = Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class Saved:
    """A benchmark with its table of requests."""

    record: BenchmarkRecord
    requests: pd.DataFrame

    @property
    def figures(self) -> dict[str, Any]:
        return self.record.figures

    @property
    def model(self) -> str:
        return str(self.record.target.get("model") or formats.UNKNOWN)


def listed(services: PageServices) -> Reading[list[BenchmarkRecord]]:
    """The newest saved benchmarks, newest first."""
    from workbench.bench import saved

    home = services.settings.home_dir
    return resources.readings().get(
        (BENCHMARKS, "listed"), lambda: saved.listed(home, limit=MAX_LISTED), ttl_s=3.0
    )


def load(services: PageServices, benchmark_id: str) -> Reading[Saved]:
    from workbench.bench import saved

    home = services.settings.home_dir
    return resources.readings().get(
        ("benchmark", benchmark_id), lambda: Saved(*saved.load(home, benchmark_id)), ttl_s=3600.0
    )


def compared(earlier: Saved, now: Saved) -> Reading[dict[str, Any]]:
    """Ratios of `now` to `earlier` with intervals, and what else differs between the two."""
    from workbench.bench.compare import compare_benchmarks

    return resources.readings().get(
        ("benchmarks compared", earlier.record.id, now.record.id),
        lambda: compare_benchmarks((earlier.record, earlier.requests), (now.record, now.requests)),
        ttl_s=3600.0,
        wait_s=1.0,
    )


def option(record: BenchmarkRecord) -> str:
    """A benchmark in one line of text that no other has, since the address holds it."""
    model = record.target.get("model") or formats.UNKNOWN
    cancelled = " · cancelled" if record.cancelled else ""
    return f"{record.title} · {model} · {formats.at_minute(record.at)}{cancelled} · {record.id[-6:]}"


def samples(requests: pd.DataFrame, latency: str) -> list[float]:
    """The raw values of a latency, of requests that went well: one each, of ITL every gap."""
    good = requests[requests["error"].isna()]
    if latency == "itl_ms":
        return [float(gap) for gaps in good["itl_ms"] for gap in gaps]
    return [float(value) for value in good[latency].dropna()]


def share_within(requests: pd.DataFrame, slo: Slo) -> tuple[int, int]:
    """How many requests kept the SLO, of how many that ended by themselves."""
    from workbench.bench.driver import CANCELLED
    from workbench.bench.report import is_good

    ended = requests[requests["error"] != CANCELLED]
    return int(is_good(ended, slo).sum()), len(ended)


def percentile(figures: Mapping[str, Any], latency: str, quantile: str) -> float | None:
    value = (figures.get(latency) or {}).get(quantile)
    return float(value) if isinstance(value, int | float) else None


def bound_by(limit: Mapping[str, Any]) -> str:
    """What the run was bound by; in records of before that was known, what the steps' least time was due to."""
    if "bound_by" in limit:
        return f"bound by {limit['bound_by']}"
    share = limit.get("bound_by_memory_share")
    if share is None:
        return "of this device's limit"
    return f"bound by {'memory' if share >= 0.5 else 'arithmetic'} for {formats.significant(100 * max(share, 1 - share), 2)} %"


def csv_of(table: pd.DataFrame) -> bytes:
    """The table as CSV in which no text is a formula to a spreadsheet: ids and reasons may be another server's."""

    def plain(value: object) -> object:
        return (
            f"'{value}"
            if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
            else value
        )

    written: str = table.map(plain).to_csv(index=False)
    return written.encode()
