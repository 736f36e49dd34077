"""A row of the request log as OpenTelemetry spans: the request, and in it queue, prefill and decode with the engine's own times.

Trace and span ids are functions of the row, so that a span sent twice is one span, and a request's trace is found without asking.
Texts are those that the row holds, which the request log's policy has been over.

Source: OpenTelemetry semantic conventions 1.38, "Generative AI" (gen_ai.*), "Server" and "General attributes".

Boundary: values to values; imports OpenTelemetry's SDK, so import it where spans are made. Who gets them is `trace_export`'s.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import Any

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_SCOPE = InstrumentationScope("workbench.observe")
_FAILED = ("error", "timeout")
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)


def trace_id_of(request_id: str) -> int:
    """The trace of a request that brought none of its own."""
    return int.from_bytes(blake2b(request_id.encode("utf-8", "replace"), digest_size=16).digest(), "big")


def parent_of(traceparent: str | None) -> SpanContext | None:
    """The caller's span; None where there is none, or nothing that the W3C's format allows."""
    found = _TRACEPARENT.fullmatch(traceparent or "")
    if found is None:
        return None
    trace_id, span_id, flags = (int(part, 16) for part in found.groups())
    parent = SpanContext(trace_id, span_id, is_remote=True, trace_flags=TraceFlags(flags))
    return parent if parent.is_valid else None


def is_sampled(trace_id: int, share: float) -> bool:
    """Whether a trace is one of the `share` that is kept: the same answer for the same trace, everywhere.

    Source: TraceIdRatioBased of OpenTelemetry's SDK specification.
    """
    return (trace_id & (1 << 64) - 1) < round(share * (1 << 64))


def spans_of(
    row: Mapping[str, Any], resource: Resource, server: Mapping[str, Any], parent: SpanContext | None = None
) -> Iterator[ReadableSpan]:
    """The request's span and those of its phases. `row`: as `request_writer` writes it. `server`: attributes of all of them.

    `parent`: the caller's span, whose trace they join; None makes them a trace of their own.
    """
    trace_id = parent.trace_id if parent is not None else trace_id_of(row["request_id"])
    root = SpanContext(trace_id, _span_id(row, "request"), is_remote=False, trace_flags=_SAMPLED)
    times = _times(row)
    operation = row.get("operation") or "text_completion"
    yield ReadableSpan(
        f"{operation} {row['model']}",
        root,
        parent,
        resource,
        {**server, **_attributes(row, operation)},
        kind=SpanKind.SERVER,
        status=Status(StatusCode.ERROR, row.get("error"))
        if row["finish_reason"] in _FAILED
        else Status(StatusCode.UNSET),
        start_time=times["arrival"],
        end_time=times["finished"],
        instrumentation_scope=_SCOPE,
    )
    for phase, begin, end in (
        ("queue", "arrival", "admitted"),
        ("prefill", "admitted", "first_token"),
        ("decode", "first_token", "finished"),
    ):
        if times.get(begin) is not None and times.get(end) is not None:
            context = SpanContext(trace_id, _span_id(row, phase), is_remote=False, trace_flags=_SAMPLED)
            yield ReadableSpan(
                phase, context, root, resource, {}, start_time=times[begin], end_time=times[end],
                instrumentation_scope=_SCOPE,
            )  # fmt: skip


def _attributes(row: Mapping[str, Any], operation: str) -> dict[str, Any]:
    given = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "quire",
        "gen_ai.request.model": row["model"],
        "gen_ai.response.model": row["model"],
        "gen_ai.response.id": row["request_id"],
        "gen_ai.response.finish_reasons": (row["finish_reason"],),
        "gen_ai.usage.input_tokens": row.get("num_prompt_tokens"),
        "gen_ai.usage.output_tokens": row.get("num_output_tokens"),
        "gen_ai.usage.cache_read.input_tokens": row.get("num_cached_tokens"),
        "gen_ai.conversation.id": row.get("session"),
        "user.id": row.get("user"),
        "error.type": row["finish_reason"] if row["finish_reason"] in _FAILED else None,
        "gen_ai.input.messages": None if row.get("prompt") is None else _messages(row["prompt"]),
        "gen_ai.output.messages": None if row.get("output") is None else json.dumps(
            [{**_message("assistant", row["output"]), "finish_reason": row["finish_reason"]}], ensure_ascii=False
        ),
        "quire.version.digest": row.get("version_digest") or None,
        "quire.num_preemptions": row.get("num_preemptions"),
    }  # fmt: skip
    return {name: value for name, value in given.items() if value is not None}


def _messages(prompt: str) -> str:
    """The prompt as gen_ai.input.messages: a conversation, or one message of a text."""
    try:
        turns = json.loads(prompt)
        told = [_message(turn["role"], turn["content"]) for turn in turns]
    except (ValueError, TypeError, KeyError):
        told = [_message("user", prompt)]
    return json.dumps(told, ensure_ascii=False)


def _message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "parts": [{"type": "text", "content": content}]}


def _times(row: Mapping[str, Any]) -> dict[str, int | None]:
    """UTC nanoseconds of what happened to the request."""
    offset_ns = row["finished_at"] * 1_000 - row["finished_ns"]
    names = ("arrival", "admitted", "first_token", "finished")
    times = {name: row.get(f"{name}_ns") for name in names}
    found = {name: None if at is None else at + offset_ns for name, at in times.items()}
    if found["arrival"] is None:  # its engine died under it
        found["arrival"] = found["finished"]
    return found


def _span_id(row: Mapping[str, Any], phase: str) -> int:
    return int.from_bytes(blake2b(f"{row['row']}/{phase}".encode(), digest_size=8).digest(), "big")
