"""All routes of the API, for the app with pages (`workbench.app`) and for `quire serve` alike.

They are explicit because Streamlit answers every path it does not know with its page and status 200.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route

from engine.errors import EngineError
from workbench.api.endpoints import Endpoints
from workbench.api.errors import on_http_exception, on_typed_error, on_unexpected_error
from workbench.api.feedback import FeedbackRoute
from workbench.api.info_metrics import info_families
from workbench.api.internal import internal_app
from workbench.api.load import DrainGate, LoadRoutes
from workbench.api.lora import LoraRoutes
from workbench.api.metrics import EngineMetrics
from workbench.api.mlflow_proxy import MlflowProxy
from workbench.api.openapi import OpenApiRoute
from workbench.api.pooling import PoolingRoutes
from workbench.api.probes import Probes
from workbench.api.responses import ResponsesRoute
from workbench.api.tokenization import TokenizationRoutes
from workbench.errors import WorkbenchError
from workbench.host import EngineHost
from workbench.settings import Settings

if TYPE_CHECKING:
    from workbench.services import Services

_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]


def api_routes(
    host: EngineHost,
    settings: Settings,
    metrics: EngineMetrics,
    *,
    token: str,
    proxy: MlflowProxy,
    services: Services | None = None,
) -> list[BaseRoute]:
    """Routes for a Starlette or Streamlit app. `metrics` must watch the host's engines (EngineHost's `on_ready`).

    `token` opens the internal routes. Without `services` nothing is logged and feedback is refused.
    """
    metrics.about(lambda: info_families(host, services))
    probes = Probes(host, metrics.registry)
    under_v1, *beside_v1 = _public_apps(host, settings, metrics, services)
    return [
        Route("/healthz", probes.healthz),
        Route("/health", probes.healthz),
        Route("/readyz", probes.readyz),
        Route("/metrics", probes.metrics),
        Route("/v1", _no_such_path, methods=_METHODS),
        Mount("/v1", under_v1),
        *(Route(route.path, app) for app in beside_v1 for route in app.routes if isinstance(route, Route)),
        Mount("/quire", internal_app(host, token, services)),
        Route("/mlflow", _to_mlflow, methods=["GET"]),
        Mount("/mlflow", proxy),
    ]


def _public_apps(
    host: EngineHost, settings: Settings, metrics: EngineMetrics, services: Services | None
) -> tuple[Starlette, Starlette, Starlette]:
    """What is below /v1, beside it vLLM's routes and the document, and what says how much room there is."""
    endpoints = Endpoints(host, settings, services)
    responses = ResponsesRoute(endpoints, host, settings)
    feedback = FeedbackRoute(services)
    lora = LoraRoutes(host, settings)
    pooling = PoolingRoutes(host, settings, services)
    tokenization = TokenizationRoutes(host, settings)
    load = LoadRoutes(host, metrics)
    under_v1 = [
        Route("/chat/completions", endpoints.chat, methods=["POST"]),
        Route("/completions", endpoints.completion, methods=["POST"]),
        Route("/responses", responses.create, methods=["POST"]),
        Route("/embeddings", pooling.embeddings, methods=["POST"]),
        Route("/rerank", pooling.rerank, methods=["POST"]),
        Route("/score", pooling.score, methods=["POST"]),
        Route("/feedback", feedback.post, methods=["POST"]),
        Route("/load_lora_adapter", lora.load, methods=["POST"]),
        Route("/unload_lora_adapter", lora.unload, methods=["POST"]),
        Route("/models", endpoints.models, methods=["GET"]),
        Route("/models/{model_id:path}", endpoints.model, methods=["GET"]),
    ]
    beside_v1 = [
        Route("/rerank", pooling.rerank, methods=["POST"]),
        Route("/v2/rerank", pooling.rerank, methods=["POST"]),
        Route("/tokenize", tokenization.tokenize, methods=["POST"]),
        Route("/detokenize", tokenization.detokenize, methods=["POST"]),
        Route("/openapi.json", OpenApiRoute().get, methods=["GET"]),
    ]
    own = [  # not behind the gate: they open it
        Route("/load", load.load, methods=["GET"]),
        Route("/drain", load.drain, methods=["POST"]),
        Route("/resume", load.resume, methods=["POST"]),
    ]
    gate = Middleware(DrainGate, host=host)
    return _app(under_v1, gate, *_forwarding(settings, services)), _app(beside_v1, gate), _app(own)


def _forwarding(settings: Settings, services: Services | None) -> list[Middleware]:
    """What sends requests of routed names on; nothing where there are none."""
    if not settings.route_table or services is None:
        return []
    from workbench.api.forward import Forwarder
    from workbench.backends.endpoints import Endpoints

    def endpoints() -> Endpoints:
        assert services.store is not None, "the app's services are open while it serves"
        return Endpoints(services.store)

    found = Middleware(
        Forwarder, routes=settings.route_table, endpoints=endpoints, max_body_bytes=settings.max_body_bytes
    )
    return [found]


def _app(routes: list[Route], *middleware: Middleware) -> Starlette:
    """An app whose every failure has OpenAI's shape."""
    return Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={
            EngineError: on_typed_error,
            WorkbenchError: on_typed_error,
            HTTPException: on_http_exception,
            Exception: on_unexpected_error,
        },
    )


async def _to_mlflow(request: Request) -> Response:
    return RedirectResponse("/mlflow/", 307)


async def _no_such_path(request: Request) -> Response:
    return await on_http_exception(request, HTTPException(404))
