"""The app as the `live` benchmark's child: the product's own wiring, plus token times told on standard output.

Says ``ready`` when the model is; answers each line on standard input with one line of JSON. Not for other use.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING

import uvicorn

from workbench import app as app_module
from workbench import settings as settings_module

if TYPE_CHECKING:
    from engine.records import EngineEvent, RequestRecord, StepRecord
    from workbench.app import Wiring


class TokenTimes:
    """A sink that keeps the token times of ended requests until they are asked for."""

    def __init__(self) -> None:
        self._ended: list[tuple[int, ...]] = []

    def on_request(self, record: RequestRecord) -> None:
        self._ended.append(record.token_ns)

    def on_step(self, record: StepRecord) -> None:
        """Not needed."""

    def on_event(self, event: EngineEvent) -> None:
        """Not needed."""

    def take(self) -> list[tuple[int, ...]]:
        taken, self._ended = self._ended, []
        return taken


def main() -> int:
    settings = settings_module.load()
    settings_module.prepare_home(settings)
    listener = socket.create_server((settings.host, settings.port))
    wiring = app_module.wire(settings)
    threading.Thread(target=_answer, args=(wiring,), daemon=True).start()
    asgi = app_module.build_app(wiring)
    config = uvicorn.Config(
        asgi, log_level=settings.log_level, access_log=False, lifespan="on", ws="websockets-sansio"
    )
    uvicorn.Server(config).run(sockets=[listener])
    return 0


def _answer(wiring: Wiring) -> None:
    while wiring.host.state().phase.value == "idle":  # the app's lifespan starts it
        time.sleep(0.05)
    state = wiring.host.wait()
    if not state.ready:
        _say(f"load failed: {state.message}")
        os._exit(1)
    times = TokenTimes()
    wiring.host.worker().add_sink(times)
    _say("ready")
    for _ in sys.stdin:
        time.sleep(0.05)  # the last request's record comes just after its last token
        _say(json.dumps(times.take()))


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
