"""The ops workbench: versions, prompts, evaluations, runs and people around the engine.

    import workbench
    with workbench.connect() as backend:  # the running app's engine, or one of our own
        backend.chat([{"role": "user", "content": "Hello"}])

Importing this imports nothing else: what a name needs is imported when it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.connect import connect

__all__ = ["connect"]


def __getattr__(name: str) -> Any:
    if name == "connect":
        from importlib import import_module

        return import_module("workbench.connect")  # the module can be called as its function
    raise AttributeError(f"module 'workbench' has no attribute {name!r}")
