"""MLflow's own AI gateway in front of a server in OpenAI's shape: added by its address, discovered, asked, streamed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fleet_shapes import Shaped, stream

from engine.sampling_params import SamplingParams
from workbench.backends.discovery import identify
from workbench.backends.endpoint_backend import EndpointBackend
from workbench.ports import free_port

SECRETS = {"MLFLOW_CRYPTO_KEK_PASSPHRASE": "a passphrase of this test alone"}


def fill(uri: str, artifacts: Path, upstream: str) -> None:
    """An endpoint of the gateway that asks `upstream`, as MLflow's pages would make it."""
    from mlflow.entities.gateway_endpoint import GatewayEndpointModelConfig, GatewayModelLinkageType
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    store = SqlAlchemyStore(uri, str(artifacts))
    secret = store.create_gateway_secret(
        "key", {"api_key": "sk-x"}, "openai", auth_config={"api_base": f"{upstream}/v1"}
    )
    model = store.create_gateway_model_definition("model", secret.secret_id, "openai", "gpt-there")
    link = GatewayEndpointModelConfig(model.model_definition_id, GatewayModelLinkageType.PRIMARY)
    store.create_gateway_endpoint("hosted", [link], usage_tracking=False)
    store.engine.dispose()


@pytest.mark.full
def test_the_gateway_is_an_endpoint(
    shaped: Callable[[dict[str, Any]], Shaped], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream = shaped({"POST /v1/chat/completions": stream("Hello ", "you")})
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    uri, port = f"sqlite:///{tmp_path / 'mlflow.db'}", free_port("127.0.0.1")
    fill(uri, tmp_path / "artifacts", upstream.url)
    environment = {
        **os.environ, "MLFLOW_GATEWAY_API_BASE_ALLOW_PRIVATE_IPS": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }  # fmt: skip
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "-w",
        "1",
        "--static-prefix",
        "/mlflow",
        "--port",
        str(port),
    ]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            [*command, "--backend-store-uri", uri],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}/mlflow"
    try:
        for _ in range(1200):
            assert server.poll() is None, (tmp_path / "log").read_text()
            try:
                if httpx.get(f"{url}/health", verify=False).status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.1)
        made, found = identify("gateway", f"{url}/gateway/mlflow/v1")
        assert (made.kind, made.url, found.models) == ("mlflow-gateway", url, ("hosted",))
        with EndpointBackend(made) as backend:
            params = SamplingParams(temperature=0.0, seed=7, max_tokens=9)
            done = backend.chat([{"role": "user", "content": "Hi"}], params)[0]
        assert (done.text, done.error) == ("Hello you", None), (tmp_path / "log").read_text()
        sent = upstream.bodies("POST /v1/chat/completions")[0]
        assert (sent["model"], sent["max_tokens"], sent["stream"]) == ("gpt-there", 9, True)
        assert upstream.asked[0][1]["authorization"] == "Bearer sk-x"
    finally:
        server.terminate()
        server.wait(30)
