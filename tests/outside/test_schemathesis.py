"""Schemathesis over the API's own document: valid, invalid and chained requests, none answered with 5xx or undocumented.

It lives in an environment of its own, made on the first run. QUIRE_OUTSIDE_EXAMPLES: of each operation, QUIRE_PROOF_SEED: of all.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from workbench.access import keys
from workbench.access.principal import Right
from workbench.store import open_store

sys.path.insert(0, str(Path(__file__).parents[1] / "workbench" / "load"))
from load_world import run_load_server

ROOT = Path(__file__).parents[2]
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
EXAMPLES = int(os.environ.get("QUIRE_OUTSIDE_EXAMPLES", "600"))
MIN_CASES = 10_000
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


@pytest.fixture(scope="session")
def outside() -> Path:
    """The programs of the environment; made again when the requirements changed."""
    folder = ROOT / ".venv-outside"
    done = folder / ".installed"
    if not done.exists() or done.stat().st_mtime < REQUIREMENTS.stat().st_mtime:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", "-q"]
        subprocess.run([*pip, "-r", str(REQUIREMENTS)], check=True)
        done.touch()
    return folder / "bin"


@dataclass(frozen=True)
class Ran:
    """What schemathesis said: whether it found nothing, how many cases it made, and its words."""

    is_clean: bool
    num_cases: int
    told: str


def schemathesis(outside: Path, folder: Path, port: int, *options: str) -> Ran:
    """One run over the document of the server at `port`."""
    seed = os.environ.get("QUIRE_PROOF_SEED", str(time.time_ns() % 2**32))
    ran = subprocess.run(
        [
            str(outside / "schemathesis"), "run", f"http://127.0.0.1:{port}/openapi.json", "--mode", "all",
            "--seed", seed, "--checks", CHECKS, "--continue-on-failure", "--generation-database", "none",
            "--request-timeout", "60", "--no-color", *options,
        ],
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    told = f"QUIRE_PROOF_SEED={seed}\n{ran.stdout[-8000:]}{ran.stderr[-2000:]}"
    found = re.search(r"([\d,]+) generated", ran.stdout)
    assert found is not None, told
    print(f"{found[1]} cases, QUIRE_PROOF_SEED={seed}")
    return Ran(ran.returncode == 0, int(found[1].replace(",", "")), told)


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_ten_thousand_cases_get_documented_answers(outside: Path, tmp_path: Path) -> None:
    # A drained server would answer every case after it with the same 503.
    options = [
        "--phases", "coverage,fuzzing,stateful", "--max-examples", str(EXAMPLES), "--exclude-path", "/drain",
    ]  # fmt: skip
    with run_load_server(tmp_path / "home", 0.0) as server:
        ran = schemathesis(outside, tmp_path, server.port, *options)
    assert ran.is_clean, ran.told
    assert EXAMPLES < 600 or ran.num_cases >= MIN_CASES, ran.told


@pytest.mark.full
@pytest.mark.timeout(600)
def test_a_key_without_admin_gets_documented_answers_on_every_route(outside: Path, tmp_path: Path) -> None:
    """/drain is among them: it is refused."""
    home = tmp_path / "home"
    with open_store(home) as store:
        key = keys.create(store, "schemathesis", (Right.INFER, Right.READ))
    with run_load_server(home, 0.0) as server:
        options = ["--phases", "fuzzing", "--max-examples", "20", "-H", f"Authorization: Bearer {key.text}"]
        ran = schemathesis(outside, tmp_path, server.port, *options)
    assert ran.is_clean, ran.told
