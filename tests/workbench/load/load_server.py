"""`quire serve` over FakeRunner in a process of its own: ``python load_server.py STEP_SECONDS``, settings from the environment.

Every request is answered with numbers in words of six characters, so that a reader sees what is missing or out of its place.
Ends with its parent.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial

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
    settings = settings_module.load()
    settings_module.prepare_home(settings)
    factory = partial(fake_worker, delay_s=float(sys.argv[1]), answer=ANSWER, num_blocks=50_000)
    listener = bind(settings.host, settings.port)
    return app.serve(settings, with_ui=False, listener=listener, announce=announce, factory=factory)


if __name__ == "__main__":
    sys.exit(main())
