"""The record of one benchmark run: its figures, and what they depend on besides the code.

A figure without its machine, package versions and commit cannot be compared with another one. Boundary: facts about the
machine, never its name or address.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path("data/results")
PACKAGES = ("numpy", "torch", "triton", "transformers", "tokenizers", "streamlit", "mlflow")


def make_record(name: str, figures: dict[str, Any]) -> dict[str, Any]:
    """{name, at, figures, machine, versions, commit}, all plain values that JSON holds."""
    return {
        "name": name,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "figures": figures,
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
    }


def to_json(record: dict[str, Any]) -> str:
    """One line."""
    return json.dumps(record, separators=(",", ":"))


def save(record: dict[str, Any], folder: Path) -> Path:
    """Write the record to a file of its own in `folder`; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp = record["at"].replace(":", "").replace("-", "").split("+")[0]
    path = folder / f"{record['name']}-{stamp}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, memory, accelerators, load at this moment."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "accelerators": _accelerators(),
        "load_1min": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str]:
    """Python and the packages that measurements depend on; those that are not installed are left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> dict[str, Any]:
    """Revision of the code that ran and whether files differ from it; None outside of a repository.

    A copy without its repository is told its revision in SOURCE_REVISION.
    """
    told = os.environ.get("SOURCE_REVISION")
    if told:
        return {"revision": told, "dirty": None}
    root = Path(__file__).resolve().parents[2]
    revision = _output(["git", "rev-parse", "HEAD"], root)
    changes = _output(["git", "status", "--porcelain", "--untracked-files=no"], root)
    return {"revision": revision or None, "dirty": None if changes is None else bool(changes)}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        return None


def _accelerators() -> list[str]:
    """GPU name and driver, one entry a device; empty where the driver's tool does not exist."""
    listed = _output(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"], Path.cwd())
    return [line.strip() for line in listed.splitlines()] if listed else []


def _output(command: list[str], folder: Path) -> str | None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
