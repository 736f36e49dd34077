"""``python -m engine.bench``: ends with one line of JSON that carries machine, versions and commit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.bench import __main__ as bench
from engine.bench.record import make_record, save

SMALL = [
    "overhead", "--rows", "1", "5", "--contexts", "64", "128", "256", "--max-tokens", "1000", "--cached", "600",
    "--rounds", "2", "--steps", "16",
]  # fmt: skip


def test_the_overhead_benchmark_runs_the_cases_that_it_names_and_ends_with_its_record(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert bench.main(SMALL) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["name"] == "overhead"
    assert {"figures", "machine", "versions", "commit", "at"} <= set(record)
    assert {"cpu", "cores", "memory_gib", "accelerators"} <= set(record["machine"])
    assert {"python", "numpy"} <= set(record["versions"])
    figures = record["figures"]
    cases = {(case["rows"], case["context"], case["cached_blocks"]): case for case in figures["cases"]}
    assert set(cases) == {(rows, *size) for rows in (1, 5) for size in ((64, 0), (128, 0), (64, 600))} | {
        (1, 256, 0)
    }
    for (rows, _, _), case in cases.items():
        assert case["tokens"] == 2 * 16 * rows, "each row brought one token in each step of each round"
        assert 0 < case["lowest"] <= case["us_per_row_step"] <= case["highest"]
    assert figures["worst_us"] == max(case["us_per_row_step"] for size, case in cases.items() if size[0] == 5)
    assert figures["context_ratio"] > 0 < figures["cached_ratio"]
    assert figures["left_out"] == [[5, 256]]


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
