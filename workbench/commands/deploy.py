"""`quire deploy ray`: the engine as replicas of a Ray Serve application, on a Ray of its own on this machine.

With --dry-run it prints Ray Serve's config, which a cluster takes: `serve deploy`, or the RayService in ``deploy/kubernetes``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from workbench import settings as settings_module
from workbench.errors import HostRefusedError, SettingsError


def add(commands: argparse._SubParsersAction[Any]) -> None:
    """Add `quire deploy`."""
    parser = commands.add_parser("deploy", help="engine replicas behind one address, on Ray Serve")
    targets = parser.add_subparsers(dest="target", required=True, metavar="TARGET")
    ray = targets.add_parser("ray", help="a Ray Serve application")
    ray.add_argument("--replicas", type=int, default=1, help="engines at least (default 1)")
    ray.add_argument(
        "--max-replicas", type=int, help="engines at most: their number follows the queued tokens"
    )
    ray.add_argument(
        "--queued-tokens",
        type=int,
        default=4096,
        help="waiting tokens a replica, beyond which another starts",
    )
    ray.add_argument("--cpus", type=float, default=1.0, help="CPUs of a replica (default 1)")
    ray.add_argument("--gpus", type=float, default=0.0, help="GPUs of a replica (default 0)")
    ray.add_argument("--model", help="a folder or hub id (QUIRE_MODEL); default: the bundled model")
    ray.add_argument("--host", help="loopback address to listen on (QUIRE_HOST, default 127.0.0.1)")
    ray.add_argument("--port", type=int, help="port of the API (PORT, default 8501)")
    ray.add_argument("--home-dir", type=Path, help="where replicas keep what they compile (HOME_DIR)")
    ray.add_argument("--dry-run", action="store_true", help="print Ray Serve's config and start nothing")
    ray.add_argument("--json", action="store_true", help="print one JSON object when it is ready")
    ray.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check, then print or run. Raises SettingsError, HostRefusedError, ModelLoadError."""
    from workbench.deploy.serve_config import RayPlan

    settings = settings_module.load(
        port=arguments.port, host=arguments.host, home_dir=arguments.home_dir, model=arguments.model
    )
    if not settings.is_loopback:  # replicas have no store that could hold users and keys
        raise HostRefusedError(
            f"host {settings.host!r} is refused: replicas ask for no key", value=settings.host, param="--host",
            limit="127.0.0.1, ::1 or localhost", remedy="Put a server that asks for keys in front, with QUIRE_ROUTES.",
        )  # fmt: skip
    given = {**settings.to_env(), "QUIRE_DEVICE": "cuda"} if arguments.gpus else settings.to_env()
    plan = RayPlan(
        environment=given, host=settings.host, port=settings.port, num_replicas=arguments.replicas,
        max_replicas=arguments.max_replicas, num_cpus=arguments.cpus, num_gpus=arguments.gpus,
        target_queued_tokens=arguments.queued_tokens,
    )  # fmt: skip
    if arguments.dry_run:
        print(json.dumps(plan.serve_config(), indent=2))
        return 0
    if importlib.util.find_spec("ray") is None:
        raise SettingsError(
            "Ray Serve is not installed", value="ray", param="ray", remedy="Run `pip install 'quire[ray]'`."
        )
    if not settings.fake:
        from workbench.model_card import check_model

        check_model(settings.model_path)
    settings_module.prepare_home(settings)
    from workbench.deploy.local_ray import run_local

    def tell() -> None:
        print(f"API: {settings.url}/v1, {plan.num_replicas} replicas", file=sys.stderr, flush=True)
        if arguments.json:
            print(
                json.dumps({"event": "ready", "url": settings.url, "replicas": plan.num_replicas}), flush=True
            )

    run_local(plan, tell)
    return 0
