"""One start of an engine in a process of its own: settings as JSON in the first argument; ends with its times as one line."""

from __future__ import annotations

import json
import sys
import time


def main() -> None:
    began = time.monotonic()
    from engine.bench.parts.workload import equal_requests, run_workload
    from engine.build import build_engine
    from engine.config import EngineConfig

    imported = time.monotonic()
    engine = build_engine(EngineConfig.from_dict(json.loads(sys.argv[1])))
    built = time.monotonic()
    run_workload(engine, equal_requests("first token", 1, 16, 1, 64))
    answered = time.monotonic()
    parts = {"imports": imported - began, "build": built - imported, "first_token": answered - built}
    print(json.dumps({"answered": answered, **parts}))


if __name__ == "__main__":
    main()
