"""``python -m engine.bench``: ends with one line of JSON that carries machine, versions and commit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.bench import __main__ as bench
from engine.bench.record import make_record, save

SMALL = ["overhead", "--rows", "1", "5", "--contexts", "64", "128", "--rounds", "2", "--steps", "16"]


def test_the_overhead_benchmark_ends_with_its_record(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(SMALL) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["name"] == "overhead"
    assert {"figures", "machine", "versions", "commit", "at"} <= set(record)
    assert {"cpu", "cores", "memory_gib", "accelerators"} <= set(record["machine"])
    assert {"python", "numpy"} <= set(record["versions"])
    cases = {(case["rows"], case["context"]) for case in record["figures"]["scheduler"]}
    assert cases == {(1, 64), (1, 128), (5, 64), (5, 128)}
    assert all(
        case["lowest"] <= case["us_per_row_step"] <= case["highest"]
        for case in record["figures"]["scheduler"]
    )


def test_a_record_is_saved_whole(tmp_path: Path) -> None:
    record = make_record("some-name", {"answer": 42})
    path = save(record, tmp_path / "results")
    assert json.loads(path.read_text()) == record
    assert path.name.startswith("some-name-")


def test_an_unknown_benchmark_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        bench.main(["no-such-benchmark"])
    assert caught.value.code == 2
    assert "overhead" in capsys.readouterr().err
