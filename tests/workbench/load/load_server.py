"""`quire serve` over FakeRunner in a process of its own: ``python load_server.py STEP_SECONDS RECORD_SECONDS BLOCKS``,
settings from the environment.

Every request is answered with numbers in words of six characters, so that a reader sees what is missing or out of its place.
Ends with its parent.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from dataclasses import replace
from typing import Any

from engine.config import EngineConfig
from engine.worker import EngineWorker
from workbench import app
from workbench import settings as settings_module
from workbench.guard import die_with_parent
from workbench.host import fake_worker
from workbench.ports import bind

ANSWER = "".join(f"{i:05d} " for i in range(400))


def announce(event: str, **facts: object) -> None:
    print(json.dumps({"event": event, **facts}), flush=True)


def main() -> int:
    die_with_parent(os.getppid())
    # The request log's first Parquet file brings them into memory, 60 MB, some time after the start: here all readings have them.
    for name in ("pandas", "pyarrow.parquet"):
        importlib.import_module(name)
    settings = settings_module.load()
    settings_module.prepare_home(settings)
    step_s, record_seconds, num_blocks = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])

    def factory(config: EngineConfig, **hooks: Any) -> EngineWorker:
        config = replace(config, record_seconds=record_seconds)
        return fake_worker(config, **hooks, delay_s=step_s, answer=ANSWER, num_blocks=num_blocks)

    listener = bind(settings.host, settings.port)
    return app.serve(settings, with_ui=False, listener=listener, announce=announce, factory=factory)


if __name__ == "__main__":
    sys.exit(main())
