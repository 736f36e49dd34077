"""BenchmarkSpec: what a benchmark is to do, checked before anything is sent.

The same object is a Job's spec, the CLI's flags, a notebook's parameters and the form of a page; it is saved with the result.

Boundary: values and their limits. Requests are made from it by `workload`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from workbench.bench.errors import BenchmarkError

MAX_REQUESTS = 1_000_000
MAX_CONCURRENCY = 4_096
DEFAULT_CONCURRENCY = 8
_MAX_WARMUP = 16


class Slo(BaseModel):
    """What a request must keep to count as good; None: not asked for. Milliseconds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ttft_ms: float | None = Field(default=None, gt=0)
    tpot_ms: float | None = Field(default=None, gt=0)
    e2e_ms: float | None = Field(default=None, gt=0)

    @property
    def is_empty(self) -> bool:
        return self.ttft_ms is None and self.tpot_ms is None and self.e2e_ms is None


class BenchmarkSpec(BaseModel):
    """One benchmark: whom to load, with what, how. Make it with `parse`, which turns every complaint into a BenchmarkError.

    Prompts come from one of: synthetic lengths (the default), a `dataset` of conversations, a recorded `trace`. Requests come
    from one of: so many at a time (`concurrency`), a Poisson process (`rate` a second), the trace's own times.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    # An OpenAI-compatible server; None: the app of this HOME_DIR, or an engine of our own.
    url: str | None = None
    model: str | None = None  # None: the server's first; endpoint:NAME/MODEL is asked there
    requests: int = Field(default=32, ge=1, le=MAX_REQUESTS)
    concurrency: int | None = Field(default=None, ge=1, le=MAX_CONCURRENCY)
    rate: float | None = Field(default=None, gt=0, le=100_000)  # requests per second
    input_tokens: int = Field(default=128, ge=1, le=1_000_000)
    output_tokens: int = Field(default=64, ge=1, le=1_000_000)
    seed: int = Field(default=0, ge=0, lt=2**63)
    dataset: str | None = None  # a JSONL file of {"messages": …}, or a name in data/datasets
    trace: str | None = None  # a CSV file of arrival_s, input_tokens, output_tokens
    trace_speed: float = Field(default=1.0, gt=0, le=10_000)  # 2: twice as fast as recorded
    warmup: int | None = Field(
        default=None, ge=0, le=100_000
    )  # requests before the measured ones; None: by concurrency
    temperature: float = Field(default=0.0, ge=0, le=10)
    timeout_s: float = Field(default=600.0, gt=0, le=86_400)  # of one request
    slo: Slo = Slo()
    name: str = Field(default="", max_length=200)

    @model_validator(mode="after")
    def _one_way_each(self) -> BenchmarkSpec:
        if self.concurrency is not None and self.rate is not None:
            raise ValueError("concurrency and rate contradict each other: give one of them")
        if self.dataset is not None and self.trace is not None:
            raise ValueError("dataset and trace contradict each other: give one of them")
        if self.trace is not None and self.rate is not None:
            raise ValueError("a trace has its own arrival times: leave rate out")
        if self.url is not None and (self.model or "").startswith("endpoint:"):
            raise ValueError("an endpoint's model has its own address: leave url out")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"{self.url!r} is no address: it must begin with http:// or https://")
        return self

    @property
    def closed_loop(self) -> int | None:
        """How many requests run at a time; None: they come by a schedule."""
        if self.rate is not None or (self.trace is not None and self.concurrency is None):
            return None
        return self.concurrency or DEFAULT_CONCURRENCY

    @property
    def num_warmup(self) -> int:
        if self.warmup is not None:
            return self.warmup
        return min(self.closed_loop or 4, _MAX_WARMUP, max(1, self.requests // 2))

    @property
    def title(self) -> str:
        """One line for people."""
        if self.name:
            return self.name
        source = (
            Path(self.dataset).stem if self.dataset
            else Path(self.trace).stem if self.trace
            else f"{self.input_tokens} in, {self.output_tokens} out"
        )  # fmt: skip
        load = (
            f"{self.closed_loop} at a time" if self.closed_loop
            else f"{self.rate:g} a second" if self.rate
            else "recorded times"
        )  # fmt: skip
        return f"{source}, {load}"

    def as_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


def parse(raw: Mapping[str, Any]) -> BenchmarkSpec:
    """Check a spec.

    Raises:
        BenchmarkError: an unknown field, a value out of range, or two that contradict each other.
    """
    try:
        return BenchmarkSpec.model_validate(dict(raw))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise BenchmarkError(
            f"{field}: {message}" if field else message,
            value=first.get("input") if field else None,
            limit=(first.get("ctx") and {k: v for k, v in first["ctx"].items() if k != "error"}) or None,
            param=field or None,
            remedy=f"Fields: {', '.join(BenchmarkSpec.model_fields)}."
            if first["type"] == "extra_forbidden"
            else None,
        ) from None
