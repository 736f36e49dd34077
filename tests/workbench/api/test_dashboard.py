"""deploy/grafana/quire.json asks only for what /metrics has, in PromQL that Prometheus' own grammar takes."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import promql_parser
from prometheus_client.parser import text_string_to_metric_families

from workbench.host import fake_worker
from workbench.ports import bind
from workbench.services import Services
from workbench.settings import Settings

ROOT = Path(__file__).resolve().parents[3]
FILE = ROOT / "deploy" / "grafana" / "quire.json"
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
TARGET_LABELS = {"instance", "job"}  # which Prometheus adds


def expressions(dashboard: dict[str, Any]) -> Iterator[str]:
    for panel in dashboard["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))


def selectors(node: Any) -> Iterator[Any]:
    """Every vector selector of a parsed expression."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    children = [getattr(node, name, None) for name in ("lhs", "rhs", "expr", "param", "vector_selector")]
    for child in [*children, *(getattr(node, "args", None) or [])]:
        if child is not None and not isinstance(child, str):
            yield from selectors(child)


def test_every_expression_asks_for_metrics_and_labels_that_are_there(serve: Any, tmp_path: Path) -> None:
    with bind("127.0.0.1", 0) as closed:
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}"
    settings = Settings(home_dir=tmp_path, fake=True, demo=False, follow="", otlp_endpoint=nobody)
    with serve(partial(fake_worker, delay_s=0.0), services=Services(settings)) as server:
        server.post(max_tokens=-1)
        families = list(text_string_to_metric_families(server.http.get("/metrics").text))
    there = {family.name + suffix: family for family in families for suffix in SUFFIXES[family.type]}
    dashboard = json.loads(FILE.read_text("utf-8"))
    asked = set()
    for expression in expressions(dashboard):
        text = expression.replace("$__rate_interval", "5m").replace("$__range", "1h")
        for selector in selectors(promql_parser.parse(text)):
            assert selector.name in there, f"{expression}: no metric {selector.name}"
            asked.add(selector.name)
            family = there[selector.name]
            labels = {label for sample in family.samples for label in sample.labels} | TARGET_LABELS
            named = {matcher.name for matcher in selector.matchers.matchers}
            grouped = set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", expression))))
            if family.samples:  # no alias leads to a fake model
                assert named | grouped <= labels, f"{expression}: {selector.name} has {sorted(labels)}"
    assert len(asked) > 30
    variables = [
        each["query"]["query"] for each in dashboard["templating"]["list"] if each["type"] == "query"
    ]
    for name in re.findall(r"quire:\w+", " ".join(variables)):
        assert name in there or f"{name}_total" in there


def test_the_file_is_what_its_generator_writes_and_holds_together() -> None:
    dashboard = json.loads(FILE.read_text("utf-8"))
    made = runpy.run_path(str(ROOT / "docs" / "grafana_dashboard.py"))["dashboard"]()
    assert dashboard == made, "run python docs/grafana_dashboard.py"
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & taken, f"{panel['title']} lies over another panel"
        assert place["x"] + place["w"] <= 24
        taken |= cells
        references = [target["refId"] for target in panel.get("targets", ())]
        assert len(references) == len(set(references))
    scraped = (ROOT / "deploy" / "prometheus.yml").read_text("utf-8")
    assert "metrics_path: /metrics" in scraped
