"""The job "gate" around the comparison: which versions are meant, what stops it early, and when a promotion is left out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from workbench import cli
from workbench.evals import errors, gate_job, job
from workbench.settings import Settings
from workbench.versions.errors import RegistryUnreachableError, UnknownVersionError

Make = Callable[..., Any]


@dataclass
class Registered:
    """A registry of five versions whose champion may move."""

    champion: int = 1
    moves: list[tuple[str, int, str]] = field(default_factory=list)

    def get(self, _name: str, which: str) -> Any:
        number = {"@champion": self.champion, "@candidate": 2}.get(which) or int(which)
        if number > 5:
            raise UnknownVersionError(f"there is no version {which}")
        return SimpleNamespace(ref=SimpleNamespace(version=number))

    def versions(self, _name: str) -> list[Any]:
        return [self.get("", str(number)) for number in range(1, 6)]

    def promote(self, name: str, version: int, *, alias: str, reason: str) -> None:
        self.moves.append((name, version, f"{alias}: {reason}"))


@pytest.mark.parametrize(
    ("which", "number"),
    [("3", 3), ("@candidate", 2), ("toy/4", 4), ("toy@champion", 1), ("models:/toy/5", 5), ("newest", 5)],
)
def test_a_version_may_be_named_in_every_usual_way(which: str, number: int) -> None:
    assert gate_job._version(Registered(), "toy", which) == number  # type: ignore[arg-type]


@pytest.mark.parametrize("which", ["other/3", "other@champion", "best", "3.5", ""])
def test_a_version_of_another_name_is_refused(which: str) -> None:
    with pytest.raises(errors.CompareSpecError, match="no version of toy"):
        gate_job._version(Registered(), "toy", which)  # type: ignore[arg-type]


def test_nothing_is_promoted_over_a_champion_that_moved_meanwhile() -> None:
    registry = Registered(champion=3)
    promoted, note = gate_job._promote(registry, "toy", 1, 2, "run")  # type: ignore[arg-type]
    assert (promoted, registry.moves) == (False, [])
    assert note == "The champion became version 3 while 2 was compared with 1: not promoted."
    registry.champion = 1
    promoted, note = gate_job._promote(registry, "toy", 1, 2, "run-7")  # type: ignore[arg-type]
    assert promoted
    assert registry.moves == [("toy", 2, "champion: gate: promote, run run-7")]


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"name": ""}, errors.CompareSpecError, "name must be given"),
        ({"candidate": 3}, errors.CompareSpecError, "candidate must be given as a text"),
        ({"promote": "yes"}, errors.CompareSpecError, "promote must be true or false"),
        ({"delta": 1}, errors.CompareSpecError, "unknown field 'delta'"),
        ({"dataset": "nobody"}, errors.DatasetNotFoundError, "nobody"),
        ({"rules": "/nowhere.toml"}, errors.GateRulesError, "cannot be read"),
        ({"scorers": ["bleu"]}, errors.UnknownScorerError, "bleu"),
    ],
)
def test_a_spec_that_cannot_run_is_refused(
    make_sums: Make, tmp_path: Path, fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    make_sums(20)
    with pytest.raises(error, match=message):
        gate_job.check({"name": "toy", "candidate": "2", "dataset": str(tmp_path / "sums20.jsonl"), **fields})


def test_a_rule_without_a_metric_stops_the_command_with_code_2(
    make_sums: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_sums(20)
    rules = tmp_path / "rules.toml"
    rules.write_text('[[rules]]\nkind = "not_worse"\nmetric = "accuracy"\nmax_loss = 0.1\n')
    given = ["gate", "toy", "2", "--dataset", str(tmp_path / "sums20.jsonl"), "--rules", str(rules), "--json"]
    assert cli.main(given) == 2
    captured = capsys.readouterr()
    assert "'accuracy'" in captured.err
    assert '"code": "unknown_metric"' in captured.out.splitlines()[-1]


def test_a_dataset_that_is_none_stops_the_command_with_code_2_and_its_line(
    write_dataset: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_dataset(['{"id": "a", "messages": [{"role": "user", "content": "x"}]}', "id,question"])
    assert cli.main(["compare", "a", "b", "--dataset", str(path)]) == 2
    assert "line 2: is not one JSON object" in capsys.readouterr().err


def test_an_unknown_candidate_ends_the_job_before_a_model_is_loaded(
    make_sums: Make, shared_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_sums(20)
    monkeypatch.setenv("HOME_DIR", str(shared_home))
    context = SimpleNamespace(settings=Settings(home_dir=shared_home), home_dir=shared_home)
    spec = {"name": "nobody", "candidate": "9", "dataset": str(tmp_path / "sums20.jsonl")}
    before = set((shared_home / "run").iterdir())
    with pytest.raises(UnknownVersionError):
        gate_job.run(spec, context)  # type: ignore[arg-type]
    assert set((shared_home / "run").iterdir()) == before  # no device was locked


def test_without_mlflow_nothing_is_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    settings = Settings(home_dir=tmp_path, mlflow_tracking_uri="http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(RegistryUnreachableError, match=r"127\.0\.0\.1:9"):
        job.open_record(settings)
    assert time.monotonic() - started < 60
