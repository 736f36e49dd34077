"""Closing gives everything back: memory, tensors, threads and files, however often an engine is built."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("build_cycles.py")
MIB = 1 << 20


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="resident memory is read as Linux tells it"
)
def test_five_engines_one_after_the_other_leave_nothing() -> None:
    """Resident memory may grow by 20 MiB beyond the first two closed engines: by less than the 27 MiB of weights that a single
    engine left behind would keep, and by more than malloc's own (seen: 0 to 7 MiB, and no more with more cycles).
    """
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[3]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "5"], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    before, first, second, *later = map(json.loads, done.stdout.splitlines())
    assert len(later) == 3
    settled = max(first["resident_bytes"], second["resident_bytes"])
    for after in (first, second, *later):
        assert after["resident_bytes"] - settled < 20 * MIB
        assert after["tensors"] == before["tensors"] == 0
        assert after["threads"] == first["threads"], "a thread of an engine lives on"
        assert after["files"] == first["files"] == before["files"]
    assert "engine" not in first["threads"]
    assert not any(name.startswith(("weights", "tokenizer")) for name in first["threads"])
