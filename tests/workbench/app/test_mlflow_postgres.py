"""MLflow on PostgreSQL: the server that we start keeps versions and runs in the database of MLFLOW_BACKEND_STORE_URI."""

from __future__ import annotations

import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from workbench import settings as settings_module
from workbench import tracking
from workbench.ports import free_port
from workbench.supervisor import _mlflow_command, _mlflow_env


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")  # MLflow's own, in MLflow's code
def test_server_and_direct_access_see_the_same_runs(
    postgres_url: str, home: Path, monkeypatch: pytest.MonkeyPatch, eventually: Callable[..., bool]
) -> None:
    plain = postgres_url.replace("postgresql+psycopg", "postgresql")  # the driver that is installed is found
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", plain)
    settings = settings_module.load(home_dir=home, mlflow_port=free_port())
    folder = home / "mlflow"
    with tracking.start_run(settings, "runs", "direct") as run:
        run.log_metrics({"value": 1.5})
        run.log_dict({"kept": True}, "note.json")
    assert not (folder / "mlflow.db").exists()

    command = _mlflow_command(settings, folder)
    assert not any("postgresql" in word for word in command)  # every user of the machine sees arguments
    with (folder / "log").open("ab") as output:
        server = subprocess.Popen(
            command, env=_mlflow_env(settings), stdout=output, stderr=output, start_new_session=True
        )
        try:
            assert eventually(lambda: tracking.answers(tracking.own_server(settings)), 60), (
                folder / "log"
            ).read_text()
            found = tracking.client(settings).get_run(run.id)
            assert found.data.metrics == {"value": 1.5}
            address = f"{settings.mlflow_url}/get-artifact?path=note.json&run_uuid={run.id}"
            with urllib.request.urlopen(address, timeout=10) as answer:
                assert b"kept" in answer.read()
        finally:
            server.terminate()
            server.wait(30)
