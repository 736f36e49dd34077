"""Writes deploy/grafana/quire.json, the Grafana dashboard of ``/metrics``: ``python docs/grafana_dashboard.py``.

The file is generated, so that forty queries read as one table. Every panel shows versions apart: ``model_name`` is NAME/VERSION.
Schema: the classic dashboard JSON, schemaVersion 39, which Grafana 10.4 and later import; held against grafana-foundation-sdk 10.1,
which reads it and writes it back without a loss (November 2026).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parent.parent / "deploy" / "grafana" / "quire.json"
OF = 'model_name=~"$model",instance=~"$instance"'  # a series of a version
AT = 'instance=~"$instance"'  # a series of the server
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH, HEIGHT = 8, 8


def rate(name: str, labels: str = OF, by: str = "model_name") -> str:
    return f"sum by ({by}) (rate(quire:{name}{{{labels}}}[$__rate_interval]))"


def quantile(q: float, name: str, by: str = "model_name") -> str:
    return f"histogram_quantile({q}, {rate(name + '_bucket', by='le, ' + by)})"


def latency(name: str, title: str) -> tuple[str, str, list[tuple[str, str]]]:
    return title, "s", [(quantile(q, name), f"{{{{model_name}}}} p{q * 100:g}") for q in (0.5, 0.99)]


def gauge(name: str) -> str:
    return f"sum by (model_name) (quire:{name}{{{OF}}})"


MODEL = "{{model_name}}"
ROWS: list[tuple[str, list[tuple[str, str, list[tuple[str, str]]]]]] = [
    ("Latency", [
        latency("time_to_first_token_seconds", "Time to first token"),
        latency("request_time_per_output_token_seconds", "Time per output token (TPOT)"),
        latency("inter_token_latency_seconds", "Inter-token latency (ITL)"),
        latency("e2e_request_latency_seconds", "Request, arrival to end"),
        latency("request_queue_time_seconds", "Time in the queue"),
        ("Time in the queue by priority, p99", "s",
         [(quantile(0.99, "request_queue_time_by_priority_seconds", "model_name, priority"), f"{MODEL} {{{{priority}}}}")]),
    ]),
    ("Load", [
        ("Requests running and waiting", "short",
         [(gauge("num_requests_running"), f"{MODEL} running"), (gauge("num_requests_waiting"), f"{MODEL} waiting")]),
        ("Tokens waiting", "short", [(gauge("num_tokens_waiting"), MODEL)]),
        ("Throughput", "short",
         [(rate("prompt_tokens_total"), f"{MODEL} prompt tok/s"), (rate("generation_tokens_total"), f"{MODEL} output tok/s")]),
        ("Requests ended", "reqps", [(rate("request_success_total", by="model_name, finished_reason"), f"{MODEL} {{{{finished_reason}}}}")]),
        ("Tokens of a step, mean", "short",
         [(f"{rate('iteration_tokens_total_sum')} / {rate('iteration_tokens_total_count')}", MODEL)]),
        ("Step time, p99", "s", [(quantile(0.99, "iteration_time_seconds"), MODEL)]),
    ]),
    ("KV cache and speculation", [
        ("KV blocks in use", "percentunit", [(f"max by (model_name) (quire:kv_cache_usage_perc{{{OF}}})", MODEL)]),
        ("Prefix cache hit rate", "percentunit",
         [(f"{rate('prefix_cache_hits_total')} / {rate('prefix_cache_queries_total')}", MODEL)]),
        ("Preemptions", "ops", [(rate("num_preemptions_total"), MODEL)]),
        ("Blocks to and from host memory", "ops",
         [(rate("kv_cache_blocks_out_total"), f"{MODEL} out"), (rate("kv_cache_blocks_back_total"), f"{MODEL} back")]),
        ("Guessed tokens accepted", "percentunit",
         [(f"{rate('spec_decode_num_accepted_tokens_total')} / {rate('spec_decode_num_draft_tokens_total')}", MODEL)]),
    ]),
    ("Errors and records", [
        ("HTTP answers by status", "reqps", [(rate("http_requests_total", AT, "route, status"), "{{route}} {{status}}")]),
        ("Refused or failed, by reason", "reqps", [(rate("http_requests_refused_total", AT, "reason"), "{{reason}}")]),
        ("Refused for a full queue", "reqps", [(rate("num_requests_refused_total"), MODEL)]),
        ("Failed steps", "ops", [(rate("engine_step_errors_total"), MODEL)]),
        ("Engine healthy", "bool", [(f"min by (model_name) (quire:engine_healthy{{{OF}}})", MODEL)]),
        ("Records lost", "short", [
            (f"sum by (instance) (increase(quire:request_log_dropped_total{{{AT}}}[$__range]))", "request log {{instance}}"),
            (f"sum by (destination) (increase(quire:traces_dropped_total{{{AT}}}[$__range]))", "traces to {{destination}}"),
        ]),
    ]),
]  # fmt: skip


def dashboard() -> dict[str, Any]:
    panels: list[dict[str, Any]] = [versions_table()]
    top = HEIGHT
    for title, graphs in ROWS:
        panels.append(
            {"type": "row", "title": title, "collapsed": False, "panels": [], "id": len(panels) + 1,
             "gridPos": {"h": 1, "w": 24, "x": 0, "y": top}}
        )  # fmt: skip
        top += 1
        for index, (name, unit, queries) in enumerate(graphs):
            place = {"h": HEIGHT, "w": WIDTH, "x": index % 3 * WIDTH, "y": top + index // 3 * HEIGHT}
            panels.append(graph(len(panels) + 1, name, unit, queries, place))
        top += (len(graphs) + 2) // 3 * HEIGHT
    return {
        "uid": "quire",
        "title": "Quire",
        "tags": ["quire", "llm"],
        "description": "The engine, by version: model_name is NAME/VERSION of the registry.",
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "timezone": "",
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timepicker": {},
        "fiscalYearStartMonth": 0,
        "links": [],
        "annotations": {"list": []},
        "templating": {
            "list": [
                {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
                variable("instance", "Server", "label_values(quire:build_info, instance)"),
                variable("model", "Version", "label_values(quire:request_success_total, model_name)"),
            ]
        },
        "panels": panels,
    }


def variable(name: str, label: str, query: str) -> dict[str, Any]:
    return {
        "name": name, "label": label, "type": "query", "datasource": SOURCE, "refresh": 2, "sort": 1,
        "query": {"query": query, "refId": name},
        "multi": True, "includeAll": True, "allValue": ".*", "current": {"text": ["All"], "value": ["$__all"]},
    }  # fmt: skip


def graph(
    number: int, title: str, unit: str, queries: list[tuple[str, str]], place: dict[str, int]
) -> dict[str, Any]:
    return {
        "id": number, "type": "timeseries", "title": title, "datasource": SOURCE, "gridPos": place,
        "fieldConfig": {"defaults": {"unit": unit, "min": 0, "custom": {"fillOpacity": 8}}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
                    "tooltip": {"mode": "multi", "sort": "desc"}},
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": SOURCE, "expr": expr, "legendFormat": legend, "range": True}
            for i, (expr, legend) in enumerate(queries)
        ],
    }  # fmt: skip


def versions_table() -> dict[str, Any]:
    queries = (
        f"quire:model_info{{{OF}}}",
        f"quire:model_alias_info{{{OF}}}",
        f"quire:build_info{{{AT}}}",
    )
    hidden = {"Time": True, "Value": True, "__name__": True, "job": True}
    return {
        "id": 1, "type": "table", "title": "Resident versions, their aliases, and this build", "datasource": SOURCE,
        "gridPos": {"h": HEIGHT, "w": 24, "x": 0, "y": 0},
        "fieldConfig": {"defaults": {}, "overrides": []},
        "options": {"showHeader": True},
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": SOURCE, "expr": expr, "format": "table", "instant": True}
            for i, expr in enumerate(queries)
        ],
        "transformations": [{"id": "organize", "options": {"excludeByName": hidden}}],
    }  # fmt: skip


if __name__ == "__main__":
    FILE.write_text(json.dumps(dashboard(), indent=1) + "\n", encoding="utf-8")
