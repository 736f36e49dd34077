"""guidellm, unchanged, against the server: every request is answered, and it counts the tokens that the server counts.

It is installed beside the project's packages, in a folder that only its own process sees: it needs torch and transformers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

sys.path.insert(0, str(Path(__file__).parents[1] / "workbench" / "load"))
from load_world import run_load_server

ROOT = Path(__file__).parents[2]
REQUIREMENTS = Path(__file__).with_name("guidellm.txt")
NUM_REQUESTS, OUTPUT_TOKENS = 20, 16


@pytest.fixture(scope="session")
def guidellm() -> Path:
    """The folder with guidellm; made again when the requirements changed."""
    folder = ROOT / ".venv-guidellm"
    done = folder / ".installed"
    if not done.exists() or done.stat().st_mtime < REQUIREMENTS.stat().st_mtime:
        pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "-q", "--no-deps"]
        subprocess.run([*pip, "--upgrade", "--target", str(folder), "-r", str(REQUIREMENTS)], check=True)
        done.touch()
    return folder


@pytest.mark.full
@pytest.mark.timeout(600)
def test_every_request_completes_and_its_tokens_are_the_servers(guidellm: Path, tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(guidellm), "HF_HUB_OFFLINE": "1"}
    with run_load_server(tmp_path / "home", 0.002) as server:
        url = f"http://127.0.0.1:{server.port}"
        ran = subprocess.run(
            [
                sys.executable, "-m", "guidellm", "run", "--backend", f"kind=openai_http,target={url}",
                "--profile", "kind=constant,rate=20", "--constraint", f"kind=max_requests,count={NUM_REQUESTS}",
                "--tokenizer", f"kind=hf_auto,model={ROOT / 'data' / 'models' / 'chat-base'}",
                "--data", f"kind=synthetic_text,prompt_tokens=32,output_tokens={OUTPUT_TOKENS}",
                "--output", f"kind=json,path={tmp_path / 'report.json'}", "--disable-console",
            ],
            cwd=tmp_path, env=env, capture_output=True, text=True,
        )  # fmt: skip
        scraped = list(text_string_to_metric_families(httpx.get(f"{url}/metrics").text))
    told = f"{ran.stdout[-4000:]}{ran.stderr[-4000:]}"
    assert ran.returncode == 0, told
    [benchmark] = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
    requests = benchmark["requests"]
    counts = {state: len(requests[state]) for state in ("successful", "errored", "incomplete")}
    assert counts == {"successful": NUM_REQUESTS, "errored": 0, "incomplete": 0}, told
    tokens = [each["output_metrics"]["text_tokens"] for each in requests["successful"]]
    assert tokens == [OUTPUT_TOKENS] * NUM_REQUESTS
    served = sum(s.value for f in scraped for s in f.samples if s.name == "quire:generation_tokens_total")
    assert served == sum(tokens)
