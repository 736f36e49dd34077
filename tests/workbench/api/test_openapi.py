"""/openapi.json is valid, names every public route, and takes the bodies that the server takes. That answers are as it says is
checked with every answer that the tests of this room get (`conftest.hold_against_document`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from starlette.applications import Starlette
from starlette.routing import Mount, Route

from workbench.api.metrics import EngineMetrics
from workbench.api.openapi import OPERATIONS, document
from workbench.api.schema import parse
from workbench.app import Wiring, build_api_app
from workbench.errors import ApiError
from workbench.host import fake_worker
from workbench.services import Services
from workbench.settings import Settings

NOT_PUBLIC = {
    "/quire",
    "/mlflow",
    "/v1",
}  # own programs' routes; another server's; the answer to a path cut short


def routes(routing: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Method and path of what an app answers, as the document writes them."""
    for route in routing.routes:
        path = prefix + route.path
        if isinstance(route, Mount):
            if path not in NOT_PUBLIC - {"/v1"}:
                yield from routes(route, path)
        elif isinstance(route.endpoint, Starlette):
            assert path in {inner.path for inner in route.endpoint.routes}
            yield from (pair for pair in routes(route.endpoint) if pair[1] == path)
        elif path not in NOT_PUBLIC:
            assert isinstance(route, Route)
            yield from ((m.lower(), path.replace(":path}", "}")) for m in route.methods or () if m != "HEAD")


def test_every_public_route_is_in_the_document_and_no_other(server: Any) -> None:
    app = build_api_app(Wiring(Settings(), server.host, EngineMetrics(), None))
    assert isinstance(app, Starlette)
    told = {(method, path) for path, methods in document()["paths"].items() for method in methods}
    assert told == set(routes(app))
    assert server.http.get("/openapi.json").json() == json.loads(json.dumps(document()))


def test_the_document_is_valid() -> None:
    """Structure by hand: every reference is there, every schema is one, every operation has what it must have."""
    made = document()
    assert made["openapi"].startswith("3.1.")
    assert set(made) <= {"openapi", "info", "paths", "components"}
    schemas = made["components"]["schemas"]
    used = set()
    for part in parts(made):
        if isinstance(target := part.get("$ref"), str):
            used.add(target.removeprefix("#/components/schemas/"))
    assert used == set(schemas)
    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)
    operations = [each for methods in made["paths"].values() for each in methods.values()]
    assert len({each["operationId"] for each in operations}) == len(operations) == len(OPERATIONS)
    for path, methods in made["paths"].items():
        for each in methods.values():
            assert {p["name"] for p in each.get("parameters", ()) if p["in"] == "path"} == {
                part[1:-1] for part in path.split("/") if part.startswith("{")
            }
            assert all(answer["description"] and answer["content"] for answer in each["responses"].values())


def parts(value: Any) -> Iterator[dict[str, Any]]:
    """All objects in a document."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from parts(inner)


def test_kept_feedback_is_told_as_documented(serve: Any, tmp_path: Path) -> None:
    services = Services(Settings(home_dir=tmp_path))
    services.open()
    try:
        with serve(partial(fake_worker, delay_s=0.0), services=services) as server:
            answer = server.openai.responses.create(model=server.model, input="x", max_output_tokens=4)
            assert answer.id == f"resp_{answer._request_id}"
            body = {"request_id": answer.id, "kind": "thumbs", "value": "up"}
            kept = server.http.post("/v1/feedback", json=body).json()
            assert (kept["request_id"], kept["value"]) == (answer._request_id, "up")
            assert server.http.post("/v1/feedback", json={**body, "kind": "stars"}).status_code == 400
    finally:
        services.close()


USER = {"role": "user", "content": "x"}
FORMAT = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}}
BODIES = [
    ("/v1/chat/completions", {"messages": [USER], "temperature": 0, "response_format": FORMAT}, True),
    ("/v1/chat/completions", {"messages": [{**USER, "content": [{"type": "text", "text": "x"}]}], "stop": ["a"]}, True),
    ("/v1/chat/completions", {"messages": [USER], "temprature": 0}, False),
    ("/v1/chat/completions", {"messages": []}, False),
    ("/v1/completions", {"prompt": [[1, 2], [3]], "n": 2}, True),
    ("/v1/completions", {"prompt": [1, "a"]}, False),
    ("/v1/responses", {"input": "x"}, True),
    ("/v1/responses", {"input": [USER, {"type": "function_call_output", "call_id": "1", "output": "2"}]}, True),
    ("/v1/responses", {"input": [{"type": "item_reference", "id": "1"}]}, False),
    ("/v1/responses", {"input": "x", "text": {"format": {"type": "json_schema", "name": "s", "schema": {}}}}, True),
    ("/v1/embeddings", {"input": "x", "encoding_format": "int8"}, False),
    ("/tokenize", {"messages": [USER]}, True),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "is_good"), BODIES)
def test_the_document_takes_what_the_server_takes(path: str, body: dict[str, Any], is_good: bool) -> None:
    made = document()
    content = made["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    schema = {**content["schema"], "components": made["components"]}
    assert Draft202012Validator(schema).is_valid(body) is is_good
    kind = next(each.body for each in OPERATIONS if each.path == path)
    assert kind is not None
    try:
        parse(kind, body)
        is_taken = True
    except ApiError:
        is_taken = False
    assert is_taken is is_good
