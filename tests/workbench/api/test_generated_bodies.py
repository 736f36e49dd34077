"""Bodies made from the API's own document, as it says and changed in one place: none is answered with 5xx or undocumented.

The smaller sister of tests/outside/test_schemathesis.py: always the same bodies. That an answer's status and body are documented
is checked by the client's hook (`conftest.hold_against_document`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workbench.access.principal import Right
from workbench.api.openapi import OPERATIONS, document
from workbench.host import fake_worker
from workbench.services import Services
from workbench.settings import FAKE_MODEL, Settings

REF = "#/components/schemas/"
# Loading adapters is not allowed before anything is read; /rerank's two other names are the same handler.
ASKED = {each.body: each for each in OPERATIONS if each.body is not None and Right.ADMIN not in each.rights}
EXAMPLES = settings(
    max_examples=20, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)
TEXTS = st.text(max_size=6)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=4,
)


class Bodies:
    """Strategies for the schemas of one document: the keywords that our document has, and no other."""

    def __init__(self, schemas: dict[str, Any]) -> None:
        self._schemas = schemas
        self._named: dict[str, st.SearchStrategy[Any]] = {}

    def named(self, name: str) -> st.SearchStrategy[Any]:
        if name not in self._named:
            self._named[name] = st.deferred(lambda: self.of(self._schemas[name]))  # it may hold itself
        return self._named[name]

    def of(self, schema: dict[str, Any]) -> st.SearchStrategy[Any]:
        if "$ref" in schema:
            return self.named(schema["$ref"].removeprefix(REF))
        if choices := schema.get("anyOf") or schema.get("oneOf"):
            return st.one_of([self.of(each) for each in choices])
        if "const" in schema or "enum" in schema:
            return st.sampled_from(schema.get("enum") or [schema["const"]])
        kind = schema.get("type")
        return getattr(self, f"_{kind}")(schema) if kind else JSON  # type: ignore[no-any-return]

    def _null(self, schema: dict[str, Any]) -> st.SearchStrategy[Any]:
        return st.none()

    def _boolean(self, schema: dict[str, Any]) -> st.SearchStrategy[Any]:
        return st.booleans()

    def _integer(self, schema: dict[str, Any]) -> st.SearchStrategy[Any]:
        low, high = schema.get("minimum"), schema.get("maximum", schema.get("exclusiveMaximum", 2**70) - 1)
        usual = st.integers(low if low is not None else -1, min(high, 9))
        return st.one_of(usual, usual, st.integers(low, high))

    def _number(self, schema: dict[str, Any]) -> st.SearchStrategy[Any]:
        bounds = schema.get("minimum"), schema.get("maximum")
        return st.floats(*bounds, allow_nan=False, allow_infinity=False) | st.sampled_from([0, 1, 0.5])

    def _string(self, schema: dict[str, Any]) -> st.SearchStrategy[Any]:
        if "pattern" in schema:
            return st.from_regex(schema["pattern"], fullmatch=True)
        low = schema.get("minLength", 0)
        return st.text(min_size=low, max_size=min(schema.get("maxLength", low + 6), low + 6))

    def _array(self, schema: dict[str, Any]) -> st.SearchStrategy[Any]:
        low = schema.get("minItems", 0)
        return st.lists(self.of(schema.get("items", {})), min_size=low, max_size=low + 2)

    def _object(self, schema: dict[str, Any]) -> st.SearchStrategy[Any]:
        properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        if not properties:
            inner = JSON if isinstance(others, bool) else self.of(others)
            return st.dictionaries(TEXTS, inner, max_size=0 if others is False else 2)
        fields = {name: self.of(each) for name, each in properties.items()}
        required = schema.get("required", [])
        optional = st.lists(st.sampled_from(sorted(fields)), max_size=2, unique=True)

        # Few fields at a time: of many at random one is always refused, and the rest is never looked at.
        return optional.flatmap(
            lambda more: st.fixed_dictionaries({name: fields[name] for name in [*required, *more]})
        )


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a JSON value with each of its keys."""
    keyed = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in keyed:
        yield value, key
        yield from places(inner)


def change(body: Any, data: st.DataObject) -> None:
    """One value becomes another, goes or comes."""
    container, key = data.draw(st.sampled_from(list(places(body)) or [(body, "unknown")]))
    how = data.draw(st.sampled_from(["other", "other", "gone", "more"]))
    if how == "other":
        container[key] = data.draw(JSON)
    elif how == "gone":
        container.pop(key, None) if isinstance(container, dict) else container.pop(key)
    else:
        body["unknown"] = data.draw(JSON)


@pytest.fixture(scope="module")
def kept(serve: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server with a store: feedback is kept."""
    services = Services(Settings(home_dir=tmp_path_factory.mktemp("generated")))
    services.open()
    with serve(partial(fake_worker, delay_s=0.0), services=services) as running:
        yield running
    services.close()


@pytest.fixture(scope="module")
def bodies() -> Bodies:
    return Bodies(document()["components"]["schemas"])


@pytest.mark.parametrize("operation", ASKED.values(), ids=lambda each: each.path[1:])
def test_every_body_gets_a_documented_answer(operation: Any, kept: Any, bodies: Bodies) -> None:
    seen: Counter[int] = Counter()

    @EXAMPLES
    @given(st.data())
    def ask(data: st.DataObject) -> None:
        body = data.draw(bodies.named(operation.body.__name__))
        known = operation.body.model_fields
        if "model" in known and data.draw(st.integers(0, 7)):
            body["model"] = FAKE_MODEL
        if "messages" in known and data.draw(
            st.booleans()
        ):  # most others are refused: the rest would not be looked at
            body["messages"] = [{"role": "user", "content": "x"}]
        if data.draw(st.integers(0, 2)) == 0:
            change(body, data)
        answer = kept.http.request(operation.method, operation.path, json=body)
        seen[answer.status_code] += 1
        assert answer.status_code < 500, (body, answer.text)

    ask()
    if operation.path in ("/v1/chat/completions", "/v1/completions", "/v1/responses"):
        assert seen[200], "nothing but refusals"
        assert seen[400], "no refusals"
