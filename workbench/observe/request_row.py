"""One row of the request log: its columns, and how an engine's record becomes one.

Boundary: values and their schema. When and where rows are written is `request_log`'s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from workbench.access.keys import ID_PREFIX

if TYPE_CHECKING:
    import pyarrow as pa

    from engine.records import RequestRecord

TEXT_COLUMNS = ("prompt", "output")
NS_PER_MS = 1e6

# column -> Arrow type by name. Times: *_at is UTC, *_ns the writer's monotonic clock (intervals only).
COLUMNS: dict[str, str] = {
    "request_id": "string",
    "row": "string",  # unique; a request id that a client used twice gives two rows
    "model": "string",
    "version_digest": "string",
    "key_id": "string",  # of the API key that asked
    "arrived_at": "timestamp[us, tz=UTC]",
    "finished_at": "timestamp[us, tz=UTC]",
    "arrival_ns": "int64",
    "admitted_ns": "int64",
    "first_token_ns": "int64",
    "finished_ns": "int64",
    "num_prompt_tokens": "int64",
    "num_cached_tokens": "int64",
    "num_output_tokens": "int64",
    "num_preemptions": "int64",
    "queue_ms": "double",
    "ttft_ms": "double",
    "tpot_ms": "double",
    "e2e_ms": "double",
    "grammar_compile_ms": "double",
    "finish_reason": "string",
    "error": "string",
    "prompt": "string",
    "output": "string",
    # Later columns come last, because the reader finds "finished_at" by its place; older files read as null here.
    "user": "string",  # the end user, as the caller names them
    "session": "string",
    "principal": "string",  # whose key or login it was
    "operation": "string",  # OpenTelemetry's gen_ai.operation.name
    "traceparent": "string",  # the caller's trace
    "num_draft_tokens": "int64",
    "num_accepted_tokens": "int64",
    "priority": "int64",
}


def schema() -> pa.Schema:
    """The Arrow schema of the log's files. Imports pyarrow."""
    import pyarrow as pa

    types = {
        "string": pa.string(),
        "int64": pa.int64(),
        "double": pa.float64(),
        "timestamp[us, tz=UTC]": pa.timestamp("us", tz="UTC"),
    }
    return pa.schema([(name, types[kind]) for name, kind in COLUMNS.items()])


def row_of(record: RequestRecord, model: str, version_digest: str) -> dict[str, Any]:
    """The record's figures, without `row`, times of day and text, which the writer adds. Cheap: the engine thread calls it."""
    first, end, arrival = record.first_token_ns, record.finished_ns, record.arrival_ns
    tokens = record.num_output_tokens
    last = record.token_ns[-1] if record.token_ns else end
    return {
        "request_id": record.request_id,
        "model": model,
        "version_digest": version_digest,
        "key_id": record.client if record.client.startswith(ID_PREFIX) else None,
        "arrival_ns": arrival,
        "admitted_ns": record.admitted_ns,
        "first_token_ns": first,
        "finished_ns": end,
        "num_prompt_tokens": record.num_prompt_tokens,
        "num_cached_tokens": record.num_cached_tokens,
        "num_output_tokens": tokens,
        "num_preemptions": record.num_preemptions,
        "queue_ms": None if record.admitted_ns is None else (record.admitted_ns - arrival) / NS_PER_MS,
        "ttft_ms": None if first is None else (first - arrival) / NS_PER_MS,
        "tpot_ms": (last - first) / NS_PER_MS / (tokens - 1) if first is not None and tokens > 1 else None,
        "e2e_ms": (end - arrival) / NS_PER_MS,
        "grammar_compile_ms": record.grammar_compile_ms,
        "finish_reason": record.finish_reason.value,
        "error": record.error,
        "num_draft_tokens": record.num_draft_tokens,
        "num_accepted_tokens": record.num_accepted_tokens,
        "priority": record.priority,
    }


def failed_row(request_id: str, model: str, version_digest: str, at_ns: int, error: str) -> dict[str, Any]:
    """A request that ended without a record, because the engine died under it."""
    return {
        "request_id": request_id,
        "model": model,
        "version_digest": version_digest,
        "finished_ns": at_ns,
        "finish_reason": "error",
        "error": error,
    }
