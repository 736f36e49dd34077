"""A name whose traffic is split: shares by weight, the same model for the same user, shown in /v1/models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from openai import NotFoundError

from workbench.errors import SettingsError
from workbench.host import fake_worker
from workbench.traffic import Arm, choose, parse_splits

USERS = [f"user-{i}" for i in range(4000)]
THREE = (Arm("a", 80), Arm("b", 15), Arm("c", 5))


def test_users_spread_by_weight() -> None:
    for arm in THREE:
        share = arm.weight / 100
        found = sum(choose(THREE, user) is arm for user in USERS) / len(USERS)
        # five standard deviations of a share among so many users: the hashes are fixed, so this holds always or never
        assert abs(found - share) < 5 * math.sqrt(share * (1 - share) / len(USERS))


def test_a_change_moves_only_the_users_that_it_has_to() -> None:
    before = {user: choose(THREE, user).model for user in USERS}
    without = {user: choose(THREE[:2], user).model for user in USERS}
    assert all(without[user] == model for user, model in before.items() if model != "c")
    more = (THREE[0], Arm("b", 30), THREE[2])
    moved = {choose(more, user).model for user in USERS if choose(more, user).model != before[user]}
    assert moved == {"b"}
    assert before == {user: choose(THREE[::-1], user).model for user in USERS}


def test_splits_are_read_from_one_text() -> None:
    first, second = parse_splits(" t = m@champion:90, m/2:10 ;u=x:1")
    assert (first.name, first.arms) == ("t", (Arm("m@champion", 90.0), Arm("m/2", 10.0)))
    assert (first.share(first.arms[1]), second.share(second.arms[0])) == (0.1, 1.0)
    assert parse_splits("") == ()


@pytest.mark.parametrize("text", ["t", "t=", "t=a", "t=a:0", "t=a:-1", "t=a:nan", "t=a:inf", "t=a:1,a:2", "t=a:1;t=b:1",
                                  "a/b=x:1", "a@b=x:1", "t=:1", "=a:1"])  # fmt: skip
def test_splits_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_splits(text)
    assert (caught.value.param, caught.value.value) == ("QUIRE_SPLIT", text)
    assert caught.value.limit
    assert caught.value.remedy


@pytest.fixture(scope="module")
def splitting(serve: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    root = tmp_path_factory.mktemp("models")
    with serve(partial(fake_worker, delay_s=0.0), split="chat=one:3,two:1;later=three:1") as server:
        for name in ("one", "two"):
            (root / name).mkdir()
            server.host.load(str(root / name))
        yield server


def counts(server: Any) -> dict[str, int]:
    return {name: sum(server.host.worker(name).stats().finished.values()) for name in ("one", "two")}


def test_a_user_meets_one_model_and_others_meet_all(splitting: Any, eventually: Any) -> None:
    client = splitting.openai
    arms = (Arm("one", 3), Arm("two", 1))
    hers, his = (next(u for u in USERS if choose(arms, u).model == name) for name in ("one", "two"))
    before = counts(splitting)
    for _ in range(3):
        answer = client.chat.completions.create(
            model="chat", messages=[{"role": "user", "content": "x"}], max_tokens=2, user=hers
        )
        assert answer.model == "chat"
    client.completions.create(model="chat", prompt="x", max_tokens=2, user=his)
    client.responses.create(model="chat", input="x", max_output_tokens=2, safety_identifier=his)
    expected = {"one": before["one"] + 3, "two": before["two"] + 2}
    assert eventually(lambda: counts(splitting) == expected)
    nobody = {id(splitting.host.worker("chat")) for _ in range(200)}  # all alike: less than 1e-24
    assert nobody == {id(splitting.host.worker(name)) for name in ("one", "two")}


def test_a_split_name_is_a_model_with_its_shares(splitting: Any) -> None:
    shown = splitting.http.get("/v1/models/chat").json()
    assert shown["split"] == [
        {"model": "one", "share": 0.75, "serving": "one"}, {"model": "two", "share": 0.25, "serving": "two"},
    ]  # fmt: skip
    listed = {each["id"]: each for each in splitting.http.get("/v1/models").json()["data"]}
    assert listed["chat"] == shown
    assert listed["later"]["split"] == [{"model": "three", "share": 1.0, "serving": None}]
    assert "split" not in listed["one"]


def test_without_any_of_its_models_a_name_says_which_to_load(splitting: Any) -> None:
    with pytest.raises(NotFoundError, match=r"none of the models behind 'later' is loaded.*three"):
        splitting.openai.completions.create(model="later", prompt="x")


def test_users_of_a_model_that_is_gone_meet_another(splitting: Any) -> None:
    host, arms = splitting.host, (Arm("one", 3), Arm("two", 1))
    his = next(user for user in USERS if choose(arms, user).model == "two")
    own, other = host.worker("two"), host.worker("one")
    assert host.worker("chat", his) is own
    host.unload("two")
    assert host.worker("chat", his) is other
