"""Schemathesis over the API's own document: valid, invalid and chained requests, none answered with 5xx or undocumented.

It lives in an environment of its own, made on the first run. QUIRE_OUTSIDE_EXAMPLES: of each operation, QUIRE_PROOF_SEED: of all.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

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


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_ten_thousand_cases_get_documented_answers(outside: Path, tmp_path: Path) -> None:
    seed = os.environ.get("QUIRE_PROOF_SEED", str(time.time_ns() % 2**32))
    with run_load_server(tmp_path / "home", 0.0) as server:
        ran = subprocess.run(
            [
                str(outside / "schemathesis"), "run", f"http://127.0.0.1:{server.port}/openapi.json", "--mode", "all",
                "--phases", "coverage,fuzzing,stateful", "--max-examples", str(EXAMPLES), "--seed", seed, "--checks", CHECKS,
                "--continue-on-failure", "--generation-database", "none", "--request-timeout", "60", "--no-color",
            ],
            cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
    told = f"QUIRE_PROOF_SEED={seed}\n{ran.stdout[-8000:]}{ran.stderr[-2000:]}"
    assert ran.returncode == 0, told
    found = re.search(r"([\d,]+) generated", ran.stdout)
    assert found is not None, told
    num_cases = int(found[1].replace(",", ""))
    print(f"{num_cases} cases, QUIRE_PROOF_SEED={seed}")
    assert EXAMPLES < 600 or num_cases >= MIN_CASES, told
