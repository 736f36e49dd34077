"""The workload of a benchmark: how requests arrive, how long they are, and the SLO. Bound to the address; starts nothing.

A preset of the open loop lasts as long as its last arrival plus one answer: rate and number of requests fix the time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import streamlit as st

from workbench.ui.glossary import tip

CLOSED, OPEN = "Closed loop", "Open loop"
PRESET_S, PRESET_RATE = 30, 2.0


@dataclass(frozen=True, slots=True)
class Workload:
    """What the form says. One of `concurrency` and `rate` is None; no SLO is None."""

    requests: int
    concurrency: int | None
    rate: float | None
    input_tokens: int
    output_tokens: int
    seed: int
    slo_ttft_ms: float | None
    slo_tpot_ms: float | None

    def spec(self, model: str) -> dict[str, Any]:
        """The job's spec for the app's own address."""
        arrivals = {"concurrency": self.concurrency} if self.concurrency else {"rate": self.rate}
        return {
            "model": model, "requests": self.requests, **arrivals, "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens, "seed": self.seed, "slo": self.slo,
        }  # fmt: skip

    @property
    def slo(self) -> dict[str, float | None]:
        return {"ttft_ms": self.slo_ttft_ms, "tpot_ms": self.slo_tpot_ms}

    @property
    def title(self) -> str:
        load = f"{self.concurrency} at once" if self.concurrency else f"{self.rate:g} requests/s"
        return f"{load}, {self.input_tokens} → {self.output_tokens} tokens, n = {self.requests}"


def preset() -> Workload:
    """Thirty seconds of random arrivals, the size of a short chat turn."""
    return Workload(int(PRESET_S * PRESET_RATE), None, PRESET_RATE, 64, 32, 0, 200.0, 50.0)


def show(context: int) -> Workload:
    """Render the form; `context` is the model's longest sequence in tokens."""
    default = preset()
    arrivals = st.segmented_control(
        "Arrivals", [CLOSED, OPEN], default=CLOSED, key="arrivals", bind="query-params", required=True,
        help=f"Closed: {tip('closed loop')} Open: {tip('open loop')}",
    )  # fmt: skip
    concurrency, rate = None, None
    if arrivals == OPEN:
        rate = st.number_input(
            "Requests a second", 0.01, 10_000.0, PRESET_RATE, key="rate", bind="query-params"
        )
    else:
        concurrency = st.number_input("Requests at once", 1, 4096, 8, key="concurrency", bind="query-params")
    requests = st.number_input("Requests", 1, 1_000_000, 64, key="requests", bind="query-params")
    left, right = st.columns(2)
    input_tokens = left.number_input(
        "Prompt tokens",
        1,
        context,
        min(default.input_tokens, context),
        key="input_tokens",
        bind="query-params",
    )
    output_tokens = right.number_input(
        "Output tokens",
        1,
        context,
        min(default.output_tokens, context),
        key="output_tokens",
        bind="query-params",
    )
    ttft = left.number_input(
        "TTFT SLO, ms", 0.1, None, default.slo_ttft_ms, key="slo_ttft", bind="query-params", help=tip("SLO")
    )
    tpot = right.number_input(
        "TPOT SLO, ms", 0.1, None, default.slo_tpot_ms, key="slo_tpot", bind="query-params", help=tip("SLO")
    )
    seed = st.number_input(
        "Seed",
        0,
        2**31,
        0,
        key="bench_seed",
        bind="query-params",
        help="Fixes prompts and arrival times before the run.",
    )
    return Workload(requests, concurrency, rate, input_tokens, output_tokens, seed, ttft, tpot)
