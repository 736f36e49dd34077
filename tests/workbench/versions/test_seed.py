"""The bundled versions come into the registry once, in order, whatever interrupts it; and from a moved clone too."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from workbench.settings import Settings
from workbench.versions.errors import FinetuneConfigError
from workbench.versions.registry import Registry
from workbench.versions.seed_job import NAME, check, seed_demo

ROOT = Path(__file__).parents[3]


def state(registry: Registry) -> dict[str, object]:
    return {
        "versions": [(v.ref.version, v.ref.digest) for v in registry.versions(NAME)],
        "champion": registry.get(NAME, "@champion").ref.version,
        "moves": [m.to_version for m in registry.history(NAME)],
    }


def test_seeding_twice_is_seeding_once(settings: Settings) -> None:
    registry = Registry(settings)
    assert seed_demo(settings) == {"name": NAME, "versions": {"v1": 1, "v2": 2, "v3": 3, "v4": 4}}
    first = state(registry)
    assert first["champion"] == 1
    assert first["moves"] == [1]
    assert registry.get(NAME, 1).metrics["exact_match"] > 0
    seed_demo(settings)
    assert state(registry) == first


def test_an_alias_that_somebody_moved_is_left_alone(settings: Settings) -> None:
    seed_demo(settings)
    registry = Registry(settings)
    registry.promote(NAME, 2)
    seed_demo(settings)
    assert registry.get(NAME, "@champion").ref.version == 2


_SEED = """
import sys
from pathlib import Path
from workbench.settings import Settings
from workbench.versions.seed_job import seed_demo
home = Path(sys.argv[1])
print("ready", flush=True)
seed_demo(Settings(home_dir=home, mlflow_tracking_uri=f"sqlite:///{home / 'mlflow' / 'mlflow.db'}"))
"""


@pytest.mark.full
def test_killed_anywhere_it_is_completed_the_next_time(settings: Settings) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    rng = random.Random(3)
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", _SEED, str(settings.home_dir)], stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(2.0 + 2.0 * rng.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert seed_demo(settings)["versions"] == {"v1": 1, "v2": 2, "v3": 3, "v4": 4}
    registry = Registry(settings)
    assert state(registry)["champion"] == 1
    assert [v.ref.version for v in registry.versions(NAME)] == [1, 2, 3, 4]


def test_it_takes_no_fields() -> None:
    check({})
    with pytest.raises(FinetuneConfigError, match="no fields"):
        check({"name": "x"})
