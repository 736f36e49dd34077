"""`quire versions` from the command line: one JSON object last on stdout, typed errors."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from workbench.commands import versions
from workbench.settings import Settings
from workbench.versions.errors import UnknownVersionError
from workbench.versions.registry import Registry

NAME = "extractor"
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(
    three: Registry, settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Runs one command and gives its JSON object."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(settings.mlflow_tracking_uri))
    parser = argparse.ArgumentParser()
    versions.add(parser.add_subparsers())

    def call(*words: str) -> dict[str, Any]:
        arguments = parser.parse_args(["versions", *words, "--home-dir", str(settings.home_dir), "--json"])
        capsys.readouterr()
        assert arguments.run(arguments) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return found

    return call


def test_the_whole_way(run: Run, tiny_model: Path) -> None:
    assert [v["id"] for v in run("list")["versions"]] == [f"{NAME}/{n}" for n in (1, 2, 3)]
    assert run("promote", f"{NAME}/1", "--reason", "first")["version"] == 1
    assert run("promote", f"{NAME}/3")["version"] == 3
    shown = run("show", f"{NAME}@champion")
    assert (shown["ref"]["version"], shown["aliases"], shown["metrics"]) == (
        3,
        ["champion"],
        {"exact_match": 0.3},
    )
    assert run("rollback", NAME)["version"] == 1
    moves = run("history", NAME)["moves"]
    assert [(m["from_version"], m["to_version"]) for m in moves] == [(None, 1), (1, 3), (3, 1)]
    assert moves[0]["reason"] == "first"
    assert run("register", "whole", "--base", str(tiny_model))["version"] == 1
    assert [v["id"] for v in run("list", "whole")["versions"]] == ["whole/1"]


def test_unknown_versions_are_refused(run: Run) -> None:
    for words in (
        ("show", "nobody/1"),
        ("show", "nonsense"),
        ("promote", f"{NAME}/9"),
        ("rollback", "nobody"),
    ):
        with pytest.raises(UnknownVersionError):
            run(*words)
