"""The Ray Serve config of an application: what `quire deploy ray` runs, `--dry-run` prints and KubeRay's RayService takes.

Boundary: values, checked before anything starts. Imports no Ray.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from workbench.errors import SettingsError

IMPORT_PATH = "workbench.deploy.application:build"
APPLICATION = "quire"


@dataclass(frozen=True, slots=True)
class RayPlan:
    """How many replicas, with what each, and how they are reached."""

    environment: dict[str, str]  # settings of each replica, as `quire serve` reads them
    host: str = "127.0.0.1"
    port: int = 8501
    num_replicas: int = 1
    max_replicas: int | None = None  # None: the number is fixed
    num_cpus: float = 1.0  # of a replica
    num_gpus: float = 0.0
    target_queued_tokens: int = 4096  # of a replica, before another is started

    def __post_init__(self) -> None:
        if self.num_replicas < 1:
            raise _refused("--replicas", self.num_replicas, "at least 1")
        if self.max_replicas is not None and self.max_replicas < self.num_replicas:
            raise _refused("--max-replicas", self.max_replicas, f"at least --replicas, {self.num_replicas}")
        if self.num_cpus <= 0:
            raise _refused("--cpus", self.num_cpus, "more than 0")
        if self.num_gpus < 0:
            raise _refused("--gpus", self.num_gpus, "at least 0")
        if self.target_queued_tokens < 1:
            raise _refused("--queued-tokens", self.target_queued_tokens, "at least 1")

    def arguments(self) -> dict[str, Any]:
        """What `workbench.deploy.application.build` takes."""
        return {
            "environment": self.environment, "num_replicas": self.num_replicas, "max_replicas": self.max_replicas,
            "num_cpus": self.num_cpus, "num_gpus": self.num_gpus, "target_queued_tokens": self.target_queued_tokens,
        }  # fmt: skip

    def serve_config(self) -> dict[str, Any]:
        """Ray Serve's config file, as `serve deploy` and ``serveConfigV2`` take it."""
        return {
            "proxy_location": "HeadOnly",
            "http_options": {"host": self.host, "port": self.port},
            "applications": [
                {
                    "name": APPLICATION, "route_prefix": "/", "import_path": IMPORT_PATH, "args": self.arguments(),
                }
            ],
        }  # fmt: skip


def _refused(option: str, value: float, limit: str) -> SettingsError:
    return SettingsError(
        f"{option} {value} is not accepted: it must be {limit}", value=value, limit=limit, param=option
    )
