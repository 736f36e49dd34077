"""`quire lab`: JupyterLab on the same packages, HOME_DIR and tracking server; loopback only, its token kept in HOME_DIR."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import FrameType
from typing import Any

from workbench import exit_codes
from workbench import settings as settings_module
from workbench.errors import WorkbenchError
from workbench.settings import Settings

_READY_S = 90.0


class LabError(WorkbenchError):
    """JupyterLab cannot be started."""

    code = "lab_not_started"


def add(commands: Any) -> None:
    """Add `quire lab`."""
    parser = commands.add_parser("lab", help="JupyterLab on this environment, HOME_DIR and tracking server")
    parser.add_argument("--port", dest="lab_port", type=int, help="default: the first free one from 8888")
    parser.add_argument("--open", action="store_true", help="open a browser")
    parser.add_argument("--home-dir", type=Path, help="where everything is kept (HOME_DIR)")
    parser.add_argument("--json", action="store_true", help="print one JSON object when it is up")
    parser.set_defaults(run=_lab)


def _lab(arguments: argparse.Namespace) -> int:
    settings = settings_module.load(home_dir=arguments.home_dir)
    settings_module.prepare_home(settings)
    from workbench.jobs.environment import child_environment
    from workbench.ports import check_free

    port = _free_port_from(8888) if arguments.lab_port is None else arguments.lab_port
    check_free("127.0.0.1", port, variable="--port")
    token, folder = lab_token(settings), notebook_folder(settings)
    url = f"http://127.0.0.1:{port}/lab?token={token}"
    environment = child_environment(settings, JUPYTER_TOKEN=token, JUPYTER_PREFER_ENV_PATH="1")
    try:
        process = subprocess.Popen(
            _command(port, folder, open_browser=arguments.open), env=environment, stdin=subprocess.DEVNULL,
            stdout=sys.stderr, stderr=sys.stderr, start_new_session=True,  # the guard ends its whole group
        )  # fmt: skip
    except OSError as error:
        raise LabError(f"JupyterLab cannot be started: {error}", value=str(error)) from error
    return _stay(process, port, url, folder, as_json=arguments.json)


def lab_token(settings: Settings) -> str:
    """The token of this HOME_DIR's JupyterLab, the same each time; made at the first call, readable by its owner alone."""
    file = settings.run_dir / "lab-token"
    settings.run_dir.mkdir(parents=True, exist_ok=True)
    try:
        with os.fdopen(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as opened:
            opened.write(secrets.token_hex(24))
    except FileExistsError:
        pass
    token = file.read_text("utf-8").strip()
    if not token:  # its writer was killed between making and filling it
        file.unlink(missing_ok=True)
        return lab_token(settings)
    return token


def notebook_folder(settings: Settings) -> Path:
    """Where JupyterLab opens: the checkout's notebooks, or copies of the installed ones in HOME_DIR, made once each."""
    from workbench.runs.notebooks import bundled_notebooks

    bundled = bundled_notebooks()
    if (bundled.parent / "pyproject.toml").is_file():
        return bundled
    own = settings.home_dir / "notebooks"
    own.mkdir(parents=True, exist_ok=True)
    for path in bundled.glob("*.ipynb"):
        if not (own / path.name).exists():
            shutil.copyfile(path, own / path.name)
    return own


def _command(port: int, folder: Path, *, open_browser: bool) -> list[str]:
    return [
        sys.executable, "-m", "workbench.guard", str(os.getpid()), "--",
        sys.executable, "-m", "jupyterlab", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0", f"--ServerApp.root_dir={folder}", f"--ServerApp.open_browser={open_browser}",
        # Nothing is asked of the network: no news, no extension index, no look for updates.
        "--LabApp.news_url=None", "--LabApp.extension_manager=readonly",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        *(["--allow-root"] if os.geteuid() == 0 else []),  # containers: still loopback and token
    ]  # fmt: skip


def _stay(process: subprocess.Popen[bytes], port: int, url: str, folder: Path, *, as_json: bool) -> int:
    """Tell when it is up, and stay until it ends or we are told to."""

    told = threading.Event()

    def stop(signum: int, frame: FrameType | None) -> None:
        told.set()
        process.terminate()

    for sig in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(sig, stop)
    deadline = time.monotonic() + _READY_S
    while process.poll() is None and not _answers(port):
        if time.monotonic() > deadline:
            process.terminate()
            process.wait(15)
            raise LabError(f"JupyterLab did not answer within {_READY_S:g} s", value=port, limit=_READY_S)
        time.sleep(0.2)
    if process.poll() is not None and not told.is_set():
        raise LabError(
            f"JupyterLab ended with exit code {process.returncode} before it answered", value=process.returncode,
            remedy="Its messages are above.",
        )  # fmt: skip
    if not told.is_set():
        facts = {"url": url, "folder": str(folder), "pid": os.getpid()}
        print(json.dumps(facts) if as_json else f"JupyterLab is at {url}", flush=True)
    code = process.wait()
    return 0 if told.is_set() or code == 0 else exit_codes.FAILURE


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=1):
            return True
    except (urllib.error.URLError, OSError):
        return False


def _free_port_from(first: int) -> int:
    import socket

    for port in range(first, first + 100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise LabError(f"no free port from {first} to {first + 99}", value=first, remedy="Give --port.")
