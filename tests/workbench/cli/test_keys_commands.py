"""`quire keys` and `quire audit`: what people see and what scripts read; which key commands ask a server with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from workbench.access.client_key import authorization
from workbench.cli import main


def run(capsys: pytest.CaptureFixture[str], home: Path, *arguments: str) -> tuple[int, str, str]:
    code = main([*arguments, "--home-dir", str(home)])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_keys_life_on_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def as_json(*arguments: str) -> Any:
        code, out, _ = run(capsys, tmp_path, *arguments, "--json")
        assert code == 0
        return json.loads(out)

    code, out, err = run(
        capsys, tmp_path, "keys", "create", "ci", "--right", "infer", "--daily-tokens", "1000"
    )
    assert (code, out.startswith("sk-quire-"), len(out.split())) == (0, True, 1), "the key alone, for a pipe"
    assert out.strip() not in err
    made = as_json("keys", "create", "ops", "--right", "read", "--right", "admin", "--expires-days", "3")
    found = as_json("keys", "list")["keys"]
    assert [(key["name"], key["rights"], key["limits"]) for key in found] == [
        ("ops", ["admin", "read"], {}), ("ci", ["infer"], {"daily_tokens": 1000}),
    ]  # fmt: skip
    code, shown, _ = run(capsys, tmp_path, "keys", "list")
    assert made["id"] in shown
    assert made["key"] not in shown
    assert as_json("keys", "revoke", made["id"])["revoked"]["revoked_at"]
    assert "revoked" in run(capsys, tmp_path, "keys", "list")[1].splitlines()[0]
    acts = as_json("audit", "--last", "2")["acts"]
    assert [(act["act"], act["target"]) for act in acts] == [
        ("make key", made["id"]),
        ("revoke key", made["id"]),
    ]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ("keys", "create", "x", "--right", "infer", "--max-concurrent", "0"),
            "max_concurrent must be at least 1",
        ),
        (("keys", "revoke", "key-none"), "there is no key of that id"),
        (("audit", "--last", "0"), "--last must be at least 1"),
    ],
)
def test_mistakes_are_told_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: tuple[str, ...], told: str
) -> None:
    code, _, err = run(capsys, tmp_path, *arguments)
    assert (code, len(err.splitlines())) == (2, 1)
    assert told in err


def test_commands_ask_with_the_apps_token_or_the_environments_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUIRE_API_KEY", raising=False)
    assert authorization("http://127.0.0.1:1") == {}
    monkeypatch.setenv("QUIRE_API_KEY", "k")
    assert authorization("http://127.0.0.1:1", "token") == {"authorization": "Bearer token"}
    assert (
        authorization("http://127.0.0.1:1/v1")
        == authorization("https://far.example")
        == {"authorization": "Bearer k"}
    )
    assert authorization("http://far.example") == {}, "never in the clear to another machine"
