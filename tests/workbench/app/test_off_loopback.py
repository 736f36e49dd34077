"""`quire up` on every address, with TLS and a login: the true processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from workbench import connect
from workbench.access.users import Role, UserFile
from workbench.ports import free_port

ROOT = Path(__file__).resolve().parents[3]
PASSWORD = "four random words"


def own_address() -> str:
    """An address of this machine that is not loopback; the test is skipped where there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
            address: str = probe.getsockname()[0]
        except OSError:
            pytest.skip("no address beside loopback")
    return address


@pytest.mark.full
def test_up_serves_others_over_tls_after_a_login_and_keeps_mlflow_to_itself(tmp_path: Path, monkeypatch):
    address, home, port, mlflow_port = own_address(), tmp_path / "home", free_port(), free_port()
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=quire.example.org", "-keyout", str(key), "-out", str(cert)]  # fmt: skip
    subprocess.run(made, check=True, capture_output=True)
    UserFile(home, n=2**4).add("ada", PASSWORD, Role.ADMIN)
    environment = {
        "PORT": str(port), "MLFLOW_PORT": str(mlflow_port), "HOME_DIR": str(home), "QUIRE_FAKE": "true", "QUIRE_FOLLOW": "",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    command = [sys.executable, "-m", "workbench.cli", "up", "--host", "0.0.0.0", "--ssl-certfile", str(cert), "--ssl-keyfile", str(key)]  # fmt: skip
    log = tmp_path / "up.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=tmp_path, env={**os.environ, **environment}, stdout=out, stderr=out
        )
    url = f"https://{address}:{port}"
    try:
        with httpx.Client(base_url=url, verify=False, timeout=20) as client:
            deadline = time.monotonic() + 90
            while True:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                try:
                    if client.get("/readyz").status_code == 200:
                        break
                except httpx.HTTPError:
                    pass
                time.sleep(0.3)
            assert client.get("/", headers={"accept": "text/html"}).headers["location"] == "/login?next=%2F"
            for path in ("/", "/_stcore/health", "/mlflow/", "/v1/models", "/quire/residents"):
                assert client.get(path).status_code == 401, path
            assert client.get("/", headers={"host": "evil.example"}).status_code == 403
            form = {"user": "ada", "password": PASSWORD}
            assert client.post("/login", data=form, headers={"origin": url}).status_code == 303
            assert client.get("/").status_code == client.get("/_stcore/health").status_code == 200
        monkeypatch.setenv("HOME_DIR", str(home))
        with connect() as backend:  # as a notebook does
            assert backend.generate("hello", None)
        while "MLflow is at" not in log.read_text():
            assert time.monotonic() < deadline + 60, log.read_text()
            time.sleep(0.5)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((address, mlflow_port), timeout=5).close()
        assert PASSWORD not in log.read_text()
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
