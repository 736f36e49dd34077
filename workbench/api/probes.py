"""/healthz, /readyz and /metrics: what an orchestrator and a dashboard ask.

/healthz says whether restarting the process would help: it fails only when the engine is dead or stalled, or its load
failed. /health is the same by vLLM's name. /readyz says whether a request would be answered now. All answer with the facts,
whatever the status.
"""

from __future__ import annotations

from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.requests import Request
from starlette.responses import Response

from engine.records import HealthState
from workbench.api.errors import json_response
from workbench.errors import NotReadyError
from workbench.host import EngineHost, HostPhase


class Probes:
    """The handlers, with what they need."""

    def __init__(self, host: EngineHost, registry: CollectorRegistry) -> None:
        self._host = host
        self._registry = registry

    async def healthz(self, request: Request) -> Response:
        facts = self._facts()
        waiting = facts["phase"] in (HostPhase.IDLE.value, HostPhase.LOADING.value, HostPhase.SLEEPING.value)
        alive = (
            waiting
            or self._host.is_stopping
            or facts["engine"] in (HealthState.HEALTHY.value, HealthState.STARTING.value)
        )
        return json_response({"status": "alive" if alive else "failed", **facts}, 200 if alive else 503)

    async def readyz(self, request: Request) -> Response:
        facts = self._facts()
        ready = facts["engine"] == HealthState.HEALTHY.value and not self._host.is_draining
        if self._host.is_draining:
            facts["message"] = "Drained: no new requests until it is resumed"
        return json_response({"status": "ready" if ready else "not ready", **facts}, 200 if ready else 503)

    async def metrics(self, request: Request) -> Response:
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)

    def _facts(self) -> dict[str, Any]:
        state = self._host.state()
        facts: dict[str, Any] = {
            "phase": state.phase.value,
            "message": state.message,
            "fraction": round(state.fraction, 3),
            "model": next((card.id for card in self._host.models()), None),
            "engine": None,
            "models": {each.id: each.state.phase.value for each in self._host.resident()},
        }
        try:
            health = self._host.worker().health()
        except NotReadyError:
            return facts
        facts["engine"] = health.state.value
        if health.message:
            facts["message"] = health.message
        return facts
