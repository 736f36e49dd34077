"""What pages know of endpoints: the table, and one reading of each, fetched off the script thread and never waited for.

No Streamlit here. A server that does not answer keeps its last figures, with their age.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING

from engine.sampling_params import SamplingParams
from workbench.backends.discovery import discover
from workbench.backends.endpoints import PREFIX, Endpoint, Endpoints, is_endpoint, parse_id
from workbench.fleet.status import DRAINING, LOADING, READY, Status, read_status
from workbench.model_card import ModelCard
from workbench.resident import HostPhase, HostState, Resident
from workbench.ui import resources
from workbench.ui.readings import Reading

if TYPE_CHECKING:
    from engine.worker import EngineWorker
    from workbench.ui.resources import PageServices

FLEET = "fleet"  # the subject of every reading here
TTL_S = 2.0
MODELS_TTL_S = 60.0
DOWN = "down"
_CHIPS = {READY: "ok", LOADING: "busy", DRAINING: "warn"}


@dataclass(frozen=True, slots=True)
class Row:
    """One endpoint as it was read last."""

    endpoint: Endpoint
    reading: Reading[Status]

    @property
    def state(self) -> str:
        """Of the last reading; DOWN where that failed, "asking" before the first one ended."""
        if self.reading.error is not None:
            return DOWN
        return self.reading.value.state if self.reading.value is not None else "asking"

    @property
    def chip(self) -> str:
        return "bad" if self.state == DOWN else _CHIPS.get(self.state, "idle")

    @property
    def now(self) -> Status | None:
        """The figures, where they are of now."""
        return self.reading.value if self.state != DOWN else None


def endpoints(services: PageServices) -> list[Endpoint]:
    return Endpoints(services.store).list()


def rows(services: PageServices, wait_s: float = 0.0) -> list[Row]:
    """Every endpoint with its last reading. `wait_s`: how long to wait for the first one's first."""
    found = []
    for each in endpoints(services):
        key = (FLEET, each.name, each.url, each.kind)
        reading = resources.readings().get(key, partial(read_status, each), ttl_s=TTL_S, wait_s=wait_s)
        found.append(Row(each, reading))
        wait_s = 0.0
    return found


def model_ids(services: PageServices | None) -> list[str]:
    """``endpoint:NAME/MODEL`` of what each endpoint serves, or of its own model while it has not answered."""
    found: list[str] = []
    for each in endpoints(services) if services is not None else ():
        key = (f"{FLEET}_models", each.name, each.url, each.kind)
        listed = resources.readings().get(key, partial(discover, each), ttl_s=MODELS_TTL_S, wait_s=0.1).value
        names = [each.model] if each.model else []
        names += [name for name in (listed.models if listed is not None else ()) if name not in names]
        found += [f"{PREFIX}{each.name}/{name}" for name in names]
    return found


def find(model: str) -> EngineWorker | Endpoint:
    """Who answers for a model's id. Raises as `EngineHost.worker`, UnknownEndpointError."""
    if not is_endpoint(model):
        return resources.host().worker(model)
    services = resources.services()
    assert services is not None, "endpoints are kept by the app's services"
    return Endpoints(services.store).get(parse_id(model).endpoint)


def choices(services: PageServices | None) -> dict[str, Resident]:
    """What the endpoints serve, by id, in the form in which pages choose among what is resident here."""
    ready, found = HostState(HostPhase.READY), {}
    for model in model_ids(services):
        parts = parse_id(model)
        title = f"{parts.model} at {parts.endpoint}"
        card = ModelCard(
            model, title, f"Served by the endpoint {parts.endpoint}", False, "", "", "", None, None
        )
        found[model] = Resident(model, model, card, ready, deterministic=False, is_default=False, digest="")
    return found


def lacking(models: Iterable[str], services: PageServices | None) -> dict[str, str]:
    """The sampling parameters that one of these models' endpoints does not take, and why, for people."""
    reasons: dict[str, str] = {}
    for endpoint in filter(None, (endpoint_of(model, services) for model in models)):
        kind = endpoint.abilities
        missing = {field.name for field in fields(SamplingParams)} - kind.params
        for name in (*missing, *([] if kind.can("logprobs") else ["logprobs"])):
            reasons.setdefault(name, f"{endpoint.name} ({kind.title}) does not take it.")
    return reasons


def endpoint_of(model: str, services: PageServices | None) -> Endpoint | None:
    """The endpoint that a model's id names; None for other models, and for one that is gone."""
    if services is None or not is_endpoint(model):
        return None
    name = parse_id(model).endpoint
    return next((each for each in endpoints(services) if each.name == name), None)
