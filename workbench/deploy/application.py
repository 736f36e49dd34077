"""The Ray Serve application: a gateway in front of engine replicas. ``workbench.deploy.application:build`` in Serve's config.

Boundary: wiring. Only this module and the two that Ray loads (router, gateway) import Ray as they are imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

from workbench import settings as settings_module
from workbench.deploy.autoscaling import QueuedTokensPolicy
from workbench.deploy.gateway import Gateway
from workbench.deploy.replica import EngineReplica
from workbench.deploy.serve_config import RayPlan

_STATS_PERIOD_S = 1.0
_HEALTH_PERIOD_S = 2.0
_HEALTH_TIMEOUT_S = 10.0


def build(args: Mapping[str, Any]) -> Any:
    """The application, from `RayPlan.arguments`. Raises SettingsError."""
    plan = RayPlan(**args)
    settings = settings_module.load()
    slots = int(plan.environment.get("QUIRE_MAX_NUM_SEQS", settings.max_num_seqs))
    options: dict[str, Any] = {"num_replicas": plan.num_replicas}
    if plan.max_replicas is not None:
        policy = AutoscalingPolicy(
            policy_function=QueuedTokensPolicy,
            policy_kwargs={"target_queued_tokens": plan.target_queued_tokens},
        )
        options = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=plan.num_replicas, max_replicas=plan.max_replicas, target_ongoing_requests=slots, policy=policy,
            )
        }  # fmt: skip
    engines = serve.deployment(EngineReplica).options(
        name="Engine",
        max_ongoing_requests=2 * slots,  # some wait in the engine, whose queue is in tokens; the rest with the gateways
        ray_actor_options={"num_cpus": plan.num_cpus, "num_gpus": plan.num_gpus},
        request_router_config=RequestRouterConfig(
            request_router_class="workbench.deploy.router.PrefixSlotsRouter", request_router_kwargs={"num_slots": slots},
            request_routing_stats_period_s=_STATS_PERIOD_S,
        ),
        health_check_period_s=_HEALTH_PERIOD_S,
        health_check_timeout_s=_HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=settings.shutdown_grace_seconds,
        **options,
    )  # fmt: skip
    gateway = serve.deployment(Gateway).options(
        name="Gateway", max_ongoing_requests=100_000, ray_actor_options={"num_cpus": 0}
    )
    return gateway.bind(engines.bind(plan.environment), settings.max_body_bytes)
