"""A Ray of our own on this machine: on loopback, with a token, without dashboard and usage report; nothing is left of it.

Boundary: the life of Ray's processes. What runs on them is ``workbench.deploy.application``'s.
"""

from __future__ import annotations

import os
import secrets
import signal
import sys
import threading
from collections.abc import Callable

from workbench.deploy.serve_config import APPLICATION, RayPlan


def run_local(plan: RayPlan, on_ready: Callable[[], None]) -> None:
    """Run the application until SIGTERM or SIGINT; `on_ready` is called when all replicas answer. Imports Ray."""
    _set_environment()
    import ray
    from ray import serve

    from workbench.deploy.application import build

    most = plan.max_replicas or plan.num_replicas
    ray.init(
        address="local", num_cpus=int(plan.num_cpus * most) + 1, include_dashboard=False, log_to_driver=False,
        configure_logging=False,
    )  # fmt: skip
    stop = threading.Event()
    for number in (
        signal.SIGTERM,
        signal.SIGINT,
    ):  # after Ray has set its own, which ends without ending its processes
        signal.signal(number, lambda *_: stop.set())
    try:
        serve.start(http_options={"host": plan.host, "port": plan.port})
        serve.run(build(plan.arguments()), name=APPLICATION, route_prefix="/")
        on_ready()
        stop.wait()
    finally:
        serve.shutdown()
        ray.shutdown()


def _set_environment() -> None:
    """What Ray and its processes read of the environment, some of it as they are imported."""
    os.environ |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # the one way to loopback: `_node_ip_address` is resolved to a public one
        "RAY_AUTH_MODE": "token",  # other users of this machine stay out
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_agent_register_timeout_ms": "120000",  # Ray's processes start slowly beside others on few cores
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
