"""deploy/: what the files say of the app is true: settings, paths, ports, users, times, and what the Dockerfile copies.

That they are valid at all is the business of their schemas and tools; here they are held against the code.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from workbench.app import _HARD_EXIT_S
from workbench.deploy.serve_config import RayPlan
from workbench.settings import Settings
from workbench.supervisor import _TERM_GRACE_S

ROOT = Path(__file__).resolve().parents[3]
DEPLOY = ROOT / "deploy"
BASE = DEPLOY / "kubernetes" / "base"


def load(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


@pytest.fixture(scope="module")
def serving() -> dict[str, Any]:
    [found] = load(BASE / "serving.yaml")
    return found


def test_every_variable_is_a_setting() -> None:
    known = {f"QUIRE_{name.upper()}" for name in Settings.model_fields}
    texts = [path.read_text() for path in DEPLOY.rglob("*") if path.suffix == ".yaml"]
    named = set(re.findall(r"\bQUIRE_[A-Z_]+", "\n".join([*texts, (DEPLOY / "Dockerfile").read_text()])))
    assert named
    assert named <= known


def test_the_dockerfile_copies_what_there_is_and_the_context_has_it() -> None:
    copied = [
        source
        for line in (DEPLOY / "Dockerfile").read_text().splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for source in line.split()[1:-1]
    ]
    assert set(copied) >= {"engine", "workbench", "pages", "notebooks", "data", ".streamlit"}
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sorted(copied) == sorted(allowed)
    assert all((ROOT / source).exists() for source in copied)


def test_one_user_everywhere(serving: dict[str, Any]) -> None:
    [user] = re.findall(r"^USER (\d+):\d+$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    security = serving["spec"]["template"]["spec"]["securityContext"]
    assert security["runAsUser"] == security["fsGroup"] == int(user)


def test_nobody_is_killed_before_running_requests_had_their_time(serving: dict[str, Any]) -> None:
    [config] = load(BASE / "config.yaml")
    grace = float(config["data"]["QUIRE_SHUTDOWN_GRACE_SECONDS"])
    pod = serving["spec"]["template"]["spec"]
    [_, pre_stop_s] = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert pod["terminationGracePeriodSeconds"] > float(pre_stop_s) + grace + _HARD_EXIT_S
    [compose] = load(DEPLOY / "compose.yaml")
    quire = compose["services"]["quire"]
    period = float(quire["stop_grace_period"].removesuffix("s"))
    assert period > float(quire["environment"]["QUIRE_SHUTDOWN_GRACE_SECONDS"]) + _TERM_GRACE_S


def test_probes_and_the_metric_exist(serving: dict[str, Any]) -> None:
    [container] = serving["spec"]["template"]["spec"]["containers"]
    paths = {
        container[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")
    }
    routes = (ROOT / "workbench" / "api" / "routes.py").read_text()
    assert all(f'Route("{path}"' in routes for path in paths)
    [scaler] = load(BASE / "autoscaling.yaml")
    metric = scaler["spec"]["metrics"][0]["pods"]["metric"]["name"]
    assert f'"{metric.removeprefix("quire_")}"' in (ROOT / "workbench" / "api" / "metrics.py").read_text()


def test_the_ray_service_has_a_config_that_we_could_have_printed() -> None:
    [service] = load(DEPLOY / "kubernetes" / "ray" / "rayservice.yaml")
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    [application] = config["applications"]
    plan = RayPlan(
        **application["args"], host=config["http_options"]["host"], port=config["http_options"]["port"]
    )
    assert plan.serve_config()["applications"] == [application]
    variables = {name for name in plan.environment if name not in ("HOME_DIR", "PORT")}
    assert variables <= {f"QUIRE_{name.upper()}" for name in Settings.model_fields}
