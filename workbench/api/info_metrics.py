"""Metrics that say what the others belong to: this build, each resident version and its aliases; and whether records are kept.

Facts about a version are labels of one series each, to be joined on ``model_name``, not labels of every series: the number of series
stays that of the resident versions, and an alias that moves breaks no counter. Only what is resident is told.

Boundary: reads host and request log when somebody scrapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from workbench.build_info import build_info
from workbench.host import EngineHost

if TYPE_CHECKING:
    from workbench.services import Services

PREFIX = "quire:"
_MODEL_LABELS = (
    "model_name", "name", "version", "digest", "parent", "dtype", "quantization", "kv_cache_dtype",
)  # fmt: skip


def info_families(host: EngineHost, services: Services | None) -> Iterator[Metric]:
    """Of this process, its residents, and its request log."""
    yield _build_info()
    models = GaugeMetricFamily(
        f"{PREFIX}model_info", "A resident version; always 1", labels=_MODEL_LABELS
    )  # fmt: skip
    aliases = GaugeMetricFamily(
        f"{PREFIX}model_alias_info", "An alias of a resident version; always 1", labels=("model_name", "alias")
    )  # fmt: skip
    for resident in host.resident():
        if resident.card is None or not resident.state.loaded:
            continue
        config = resident.config
        formats = (config.dtype, config.quantization, config.kv_cache_dtype) if config else ("", "", "")
        facts = (
            resident.id,
            resident.name,
            resident.version,
            resident.digest[:12],
            resident.parent,
            *formats,
        )
        models.add_metric([str(fact or "") for fact in facts], 1)
        for alias in resident.aliases:
            aliases.add_metric([resident.id, alias], 1)
    yield models
    yield aliases
    if services is not None and services.traces:
        sent = CounterMetricFamily(f"{PREFIX}traces_sent", "Traced requests", labels=("destination",))
        lost = CounterMetricFamily(
            f"{PREFIX}traces_dropped", "Requests whose traces were lost", labels=("destination",)
        )  # fmt: skip
        for destination in services.traces:
            sent.add_metric([destination.name], destination.num_sent)
            lost.add_metric([destination.name], destination.num_dropped)
        yield sent
        yield lost
    if services is not None and services.request_log is not None:
        status = services.request_log.status()
        yield CounterMetricFamily(
            f"{PREFIX}request_log_rows", "Requests written to the request log", value=status.num_written
        )
        yield CounterMetricFamily(
            f"{PREFIX}request_log_dropped", "Requests that the request log lost", value=status.num_dropped
        )


def _build_info() -> Metric:
    facts = build_info()
    family = GaugeMetricFamily(
        f"{PREFIX}build_info", "Versions of this server; always 1", labels=tuple(facts)
    )
    family.add_metric(list(facts.values()), 1)
    return family
