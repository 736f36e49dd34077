"""An engine server of the benchmark's own, where no app runs: the API without pages, in a child process on a free port.

A process of its own, because a load generator that shares the interpreter with the engine slows what it measures. It holds
the device's lock and publishes ``run/app.json`` as `quire serve` does, so that others attach instead of loading a second copy,
and it ends with its parent, however that ends.

Boundary: start and end. What is served is `workbench.app`'s.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from workbench import exit_codes
from workbench import settings as settings_module
from workbench.bench.errors import BenchmarkError
from workbench.errors import WorkbenchError
from workbench.guard import die_with_parent
from workbench.logs import configure_logging
from workbench.ports import bind, free_port
from workbench.settings import Settings

_PARENT_VARIABLE = "QUIRE_BENCH_PARENT_PID"
_END_S = 15.0


@contextmanager
def own_server(settings: Settings) -> Iterator[None]:
    """A server of these settings' model runs while this is open; ``RunState`` has its address.

    Raises:
        BenchmarkError: it ended before it had a model; with its last words.
    """
    # Nothing but the model that is measured: no followed aliases, no demonstration.
    own = settings.model_copy(update={"port": free_port(settings.host), "follow": "", "demo": False})
    env = {**os.environ, **own.to_env(), _PARENT_VARIABLE: str(os.getpid())}
    child = subprocess.Popen(
        [sys.executable, "-m", "workbench.bench.own_server"], env=env, stdout=subprocess.PIPE, text=True,
        start_new_session=True,  # Ctrl-C is for the benchmark, which then ends the server
    )  # fmt: skip
    try:
        _wait_loaded(child)
        yield
    finally:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(_END_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        assert child.stdout is not None
        child.stdout.close()


def _wait_loaded(child: subprocess.Popen[str]) -> None:
    assert child.stdout is not None
    message = "it ended"
    for line in child.stdout:
        try:
            told: dict[str, Any] = json.loads(line)
        except ValueError:
            continue  # somebody's print
        if told.get("event") == "loaded":
            return
        if told.get("event") == "failed":
            message = str(told.get("message"))
            break
    raise BenchmarkError(
        f"the benchmark's own server has no model: {message}", value=message, param="model",
        remedy="Run `quire doctor`, or start `quire up` and see its log.",
    )  # fmt: skip


def main() -> int:
    """The child: serve until told to end."""
    from workbench import app

    die_with_parent(int(os.environ.pop(_PARENT_VARIABLE)))

    def announce(event: str, **facts: Any) -> None:
        print(json.dumps({"event": event, **facts}), flush=True)

    try:
        settings = settings_module.load()
        settings_module.prepare_home(settings)
        configure_logging(settings.log_level, settings.log_format)
        listener = bind(settings.host, settings.port)
        return app.serve(settings, with_ui=False, listener=listener, announce=announce)
    except WorkbenchError as error:
        announce("failed", message=str(error))
        return exit_codes.BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
