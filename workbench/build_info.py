"""Which versions of what this process runs, for metrics and traces."""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version


@cache
def build_info() -> dict[str, str]:
    """Versions by name; empty for what is not installed as a package. Imports none of it."""
    packages = {"version": "quire", "torch": "torch", "mlflow": "mlflow"}
    return {**{name: _version(of) for name, of in packages.items()}, "python": platform.python_version()}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout that is not installed
        return ""
