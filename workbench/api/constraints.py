"""What an output must look like, as a request says it: OpenAI's response_format, vLLM's structured_outputs and guided_*.

Boundary: from a checked body to ``engine.StructuredOutputsParams``, and a strict schema's rules. Whether a grammar can be made
of it is the engine's to say.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.errors import InvalidParamsError
from engine.structured_outputs import StructuredOutputsParams
from workbench.api.schema import ChatRequest, CompletionRequest, ResponseFormat
from workbench.errors import ApiError

if TYPE_CHECKING:
    from engine.sampling_params import SamplingParams
    from engine.worker import EngineWorker

_GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}


@dataclass(frozen=True, slots=True)
class Constraint:
    """What the whole output must look like, and the field that asked for it."""

    structured: StructuredOutputsParams
    param: str


async def constrained(
    params: SamplingParams, constraint: Constraint | None, worker: EngineWorker
) -> SamplingParams:
    """The parameters with the constraint, whose grammar is made beside the event loop. Raises InvalidParamsError, by the field's name."""
    if constraint is None:
        return params
    try:
        await asyncio.to_thread(worker.compile_grammar, constraint.structured)
    except InvalidParamsError as error:
        raise InvalidParamsError(
            error.message, value=error.value, limit=error.limit, remedy=error.remedy, param=constraint.param
        ) from error
    return params.with_(structured_outputs=constraint.structured)


def constraint_of(body: ChatRequest | CompletionRequest) -> Constraint | None:
    """The body's constraint; None where any text will do.

    Raises:
        ApiError: several of them, or a schema that is missing or not strict where it says so.
        InvalidParamsError: one of the wrong form.
    """
    asked: list[Constraint] = []
    if body.response_format is not None and (found := _of_format(body.response_format)) is not None:
        asked.append(found)
    if body.structured_outputs is not None:
        asked.append(Constraint(_of_vllm(body.structured_outputs), "structured_outputs"))
    for name, kind in _GUIDED.items():
        if (value := getattr(body, name)) is not None:
            asked.append(Constraint(_made(name, {kind: value}), name))
    if len(asked) > 1:
        names = [each.param.partition(".")[0] for each in asked]
        raise ApiError(
            f"{' and '.join(names)} contradict each other", value=names, limit=1, param=names[1],
            remedy="Send one of them.",
        )  # fmt: skip
    return asked[0] if asked else None


def _of_format(asked: ResponseFormat) -> Constraint | None:
    if asked.json_schema is not None and asked.type != "json_schema":
        raise ApiError(
            f"response_format.json_schema does not go with type {asked.type!r}", value=asked.type,
            limit="json_schema", param="response_format.json_schema", remedy="Set type to json_schema, or leave it out.",
        )  # fmt: skip
    if asked.type == "text":
        return None
    if asked.type == "json_object":
        return Constraint(StructuredOutputsParams(json_object=True), "response_format")
    where = "response_format.json_schema.schema"
    schema = asked.json_schema.schema_ if asked.json_schema is not None else None
    if schema is None:
        raise ApiError("response_format has no schema", param=where, remedy=f"Send {where}.")
    assert asked.json_schema is not None
    if asked.json_schema.strict:
        check_strict(schema, where)
    return Constraint(_made(where, {"json": schema}), where)


def _of_vllm(asked: dict[str, Any]) -> StructuredOutputsParams:
    """vLLM has `disable_any_whitespace` for what is `any_whitespace` here, and sends null for what is not asked."""
    values = {name: value for name, value in asked.items() if value is not None}
    if "disable_any_whitespace" in values:
        values["any_whitespace"] = not values.pop("disable_any_whitespace")
    return StructuredOutputsParams.from_dict(values)


def _made(param: str, values: dict[str, Any]) -> StructuredOutputsParams:
    try:
        return StructuredOutputsParams.from_dict(values)
    except InvalidParamsError as error:
        raise InvalidParamsError(error.message, value=error.value, limit=error.limit, param=param) from error


def check_strict(schema: dict[str, Any], where: str) -> None:
    """Refuse a schema that OpenAI's strict mode refuses: objects must be closed, and all of their properties required.

    One is taken that OpenAI refuses: an object of free names whose values follow a schema. It is followed as any other, and
    MLflow's judges ask for it, who would go on without a schema.

    Source: OpenAI, Structured Outputs, "Supported schemas". Raises ApiError by the path of the object.
    """
    if schema.get("type") != "object":
        raise _not_strict(where, "must be an object at its root", schema.get("type"), "object")
    for path, part in schemas_in(schema, where):
        properties = part.get("properties")
        if part.get("type") != "object" and not isinstance(properties, dict):
            continue
        others = part.get("additionalProperties")
        is_map = isinstance(others, dict) and others and not properties
        if others is not False and not is_map:
            raise _not_strict(path, "must say additionalProperties: false", others, False)
        names = sorted(properties) if isinstance(properties, dict) else []
        required = part["required"] if isinstance(part.get("required"), list) else []
        missing = [name for name in names if name not in required]
        if missing:
            raise _not_strict(
                path, f"must require all of its properties, not without {', '.join(missing)}", required, names
            )


def schemas_in(schema: dict[str, Any], where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """A schema and all schemas in it, each with its path."""
    waiting: list[tuple[str, Any]] = [(where, schema)]
    while waiting:
        path, part = waiting.pop()
        if not isinstance(part, dict):
            continue
        yield path, part
        for key in ("properties", "$defs", "definitions"):
            inner = part.get(key)
            waiting += (
                [(f"{path}.{key}.{name}", s) for name, s in inner.items()] if isinstance(inner, dict) else []
            )
        for key in ("anyOf", "allOf", "oneOf", "prefixItems"):
            inner = part.get(key)
            waiting += (
                [(f"{path}.{key}.{i}", s) for i, s in enumerate(inner)] if isinstance(inner, list) else []
            )
        waiting += [(f"{path}.{key}", part.get(key)) for key in ("items", "additionalProperties")]


def _not_strict(where: str, what: str, value: Any, limit: Any) -> ApiError:
    return ApiError(
        f"a strict schema {what}: {where}", value=value, limit=limit, param=where,
        remedy="Change the schema, or leave strict out: the output follows the schema in either case.",
    )  # fmt: skip
