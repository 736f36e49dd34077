"""Which replica gets a request, and how many there are: the prompt's prefix as far as slots allow, and queued tokens."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from workbench.cli import main
from workbench.deploy.autoscaling import METRIC, QueuedTokensPolicy
from workbench.deploy.prefix import Load, PrefixMemory, prefix_chain, rank

SYSTEM = "You answer questions about invoices. " * 16  # 576 characters: two whole pieces and a part


def chat(*contents: str, model: str = "m") -> bytes:
    messages = [{"role": "user", "content": content} for content in contents]
    return json.dumps({"messages": messages, "model": model}).encode()


def shared(first: bytes, second: bytes) -> int:
    both = zip(prefix_chain(first), prefix_chain(second), strict=False)
    return sum(a == b for a, b in both)


def test_prompts_share_the_pieces_of_their_common_beginning() -> None:
    assert shared(chat(SYSTEM, "What is due?"), chat(SYSTEM, "Who pays?")) == 2
    assert shared(chat(SYSTEM), chat("!" + SYSTEM)) == 0, "a piece is named with all that is before it"
    assert shared(chat(SYSTEM), chat(SYSTEM, model="other")) == 0
    assert prefix_chain(json.dumps({"prompt": [SYSTEM]}).encode()) != ()
    assert len(prefix_chain(chat("x" * 10**6))) == 64
    for other in (b"", b"{", b"[1]", b'{"messages": 3}', b'{"prompt": ""}'):
        assert prefix_chain(other) == ()


def test_memory_knows_who_had_how_much_and_forgets_the_oldest() -> None:
    memory = PrefixMemory(max_pieces=4)
    memory.remember(("a", "b", "c"), "one")
    memory.remember(("a", "b", "d"), "two")
    assert memory.matches(("a", "b", "c")) == {"two": 2, "one": 3}
    assert memory.matches(("x", "a")) == {}
    memory.remember(("e",), "one")
    assert memory.matches(("a", "b", "c")) == {"two": 2}, "c was used least recently"


@pytest.mark.parametrize(
    ("loads", "matches", "order"),
    [
        ({"a": Load(1, 8), "b": Load(0, 8)}, {"a": 3}, ["a", "b"]),  # a little busier, and it has the prompt
        ({"a": Load(7, 8), "b": Load(0, 8)}, {"a": 3}, ["b", "a"]),  # overloaded beside the mean
        ({"a": Load(8, 8), "b": Load(8, 9)}, {"a": 3}, ["b", "a"]),  # no free slot
        (
            {"a": Load(2, 8), "b": Load(1, 8), "c": Load(1, 8, 500)},
            {},
            ["b", "a", "c"],
        ),  # waiting tokens weigh most
    ],
)
def test_the_prefix_decides_among_those_with_room(
    loads: dict[str, Load], matches: dict[str, int], order: list[str]
) -> None:
    assert rank(loads, matches) == order


@pytest.mark.parametrize(
    ("queued", "running", "replicas", "wanted"),
    [
        ([0, 0], 5, 2, 1),  # one would do
        ([0, 0], 12, 2, 2),  # more than one batch
        ([900, 0], 20, 2, 2),  # below the target
        ([3000, 1500], 30, 2, 5),
        ([0], 0, 1, 1),  # never none
        ([0, 0, 0, 0], 0, 4, 3),  # one at a time
    ],
)
def test_replicas_follow_the_queued_tokens(
    queued: list[float], running: float, replicas: int, wanted: int
) -> None:
    context: Any = SimpleNamespace(
        aggregated_metrics={METRIC: dict(enumerate(queued))}, current_num_replicas=replicas, total_queued_requests=0,
        total_num_requests=running, config=SimpleNamespace(target_ongoing_requests=8),
    )  # fmt: skip
    assert QueuedTokensPolicy(target_queued_tokens=1000)(context) == (wanted, {})


def test_dry_run_prints_ray_serves_config(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("HOME_DIR", str(tmp_path))
    assert (
        main(["deploy", "ray", "--replicas", "2", "--max-replicas", "4", "--model", "org/m", "--dry-run"])
        == 0
    )
    [application] = json.loads(capsys.readouterr().out)["applications"]
    assert application["import_path"] == "workbench.deploy.application:build"
    assert (application["args"]["num_replicas"], application["args"]["max_replicas"]) == (2, 4)
    assert application["args"]["environment"]["QUIRE_MODEL"] == "org/m"
    assert main(["deploy", "ray", "--replicas", "3", "--max-replicas", "2", "--dry-run"]) == 2
    assert "at least --replicas, 3" in capsys.readouterr().err
