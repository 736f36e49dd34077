"""Versions in a real MLflow store: registered once, promoted, rolled back exactly, with a history that misses no move."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from workbench import tracking
from workbench.access import audit
from workbench.settings import Settings
from workbench.store import open_store
from workbench.versions import aliases
from workbench.versions.adapter import adapter_digest
from workbench.versions.digest import folder_digest
from workbench.versions.errors import (
    InvalidAliasError,
    NothingToRollBackError,
    RegistryUnreachableError,
    UnknownVersionError,
    VersionError,
    WrongBaseError,
)
from workbench.versions.merge import merged_digest
from workbench.versions.registry import Registry

NAME = "extractor"


def test_registered_by_reference_with_digests(
    registry: Registry, tiny_model: Path, make_adapter: Callable[[int], Path]
) -> None:
    adapter = make_adapter(1)
    whole = registry.register("tiny", base=tiny_model, description="the whole model")
    tuned = registry.register(
        NAME, base=tiny_model, adapter=adapter, tags={"team": "support"}, metrics={"f1": 0.25}
    )
    assert (whole.version, whole.digest, whole.base_digest) == (
        1,
        folder_digest(tiny_model),
        folder_digest(tiny_model),
    )
    assert tuned.digest == merged_digest(folder_digest(tiny_model), adapter_digest(adapter))
    info = registry.get(NAME, 1)
    assert (info.ref, info.metrics, info.tags) == (tuned, {"f1": 0.25}, {"team": "support"})
    assert info.lineage["base_path"] == str(tiny_model.resolve())
    assert info.lineage["adapter_path"] == str(adapter.resolve())
    assert info.size_bytes > (tiny_model / "model.safetensors").stat().st_size
    assert registry.get("tiny", "1").description == "the whole model"
    assert registry.names() == [NAME, "tiny"]
    assert [v.ref.id for v in registry.versions()] == [f"{NAME}/1", "tiny/1"]


def test_weights_are_not_copied_and_the_adapter_is(
    registry: Registry, settings: Settings, tiny_model: Path, make_adapter: Callable[[int], Path]
) -> None:
    registry.register(NAME, base=tiny_model, adapter=make_adapter(1))
    stored = [p for p in (settings.home_dir / "mlflow" / "artifacts").rglob("*") if p.is_file()]
    assert {p.name for p in stored} >= {"MLmodel", "adapter_model.safetensors", "adapter_config.json"}
    assert "model.safetensors" not in {p.name for p in stored}


def test_same_content_is_one_version(
    three: Registry, tiny_model: Path, make_adapter: Callable[[int], Path]
) -> None:
    again = three.register(NAME, base=tiny_model, adapter=make_adapter(2))
    assert again.version == 2
    assert [v.ref.version for v in three.versions(NAME)] == [1, 2, 3]


def test_promote_and_roll_back_step_by_step(three: Registry) -> None:
    for version in (1, 2, 3):
        three.promote(NAME, version, reason=f"take {version}")
    assert three.get(NAME, "@champion").ref.version == 3
    assert [three.rollback(NAME).version, three.rollback(NAME).version] == [2, 1]
    with pytest.raises(NothingToRollBackError):
        three.rollback(NAME)
    assert three.get(NAME, "@champion").ref.version == 1
    moves = [(m.from_version, m.to_version, m.is_rollback) for m in three.history(NAME)]
    assert moves == [(None, 1, False), (1, 2, False), (2, 3, False), (3, 2, True), (2, 1, True)]
    three.promote(NAME, 3)
    assert three.previous(NAME) == 1, "what was rolled back is not gone back to"
    assert three.rollback(NAME).version == 1


def test_promoting_what_is_there_records_nothing(three: Registry) -> None:
    three.promote(NAME, 2)
    three.promote(NAME, 2)
    assert len(three.history(NAME)) == 1
    assert three.history(NAME)[0].who


def test_moves_are_on_the_audit_log(three: Registry, settings: Settings) -> None:
    three.promote(NAME, 1)
    three.promote(NAME, 2)
    three.promote(NAME, 2)  # it is there already: no act
    three.rollback(NAME)
    with open_store(settings.home_dir) as store:
        acts = [(each.act, each.target, each.detail) for each in audit.latest(store)]
    moves = ["from 2 to 1", "from 1 to 2", "from nothing to 1"]
    assert acts == [("move alias", f"{NAME}@champion", move) for move in moves]


def test_moves_made_in_mlflow_are_seen_and_rolled_back_to(three: Registry, settings: Settings) -> None:
    three.promote(NAME, 1)
    client = tracking.client(settings)
    client.set_registered_model_alias(NAME, "champion", "2")
    assert three.get(NAME, "@champion").ref.version == 2
    assert [(m.from_version, m.to_version) for m in three.history(NAME)] == [(None, 1), (1, 2)]
    three.promote(NAME, 3)
    moves = three.history(NAME)
    assert [(m.from_version, m.to_version) for m in moves] == [(None, 1), (1, 2), (2, 3)]
    assert [m.at for m in moves] == sorted({m.at for m in moves})
    assert three.rollback(NAME).version == 2


def test_killed_between_the_alias_and_its_record_rolls_back_exactly(
    three: Registry, settings: Settings
) -> None:
    three.promote(NAME, 1)
    tracking.client(settings).set_registered_model_alias(
        NAME, "champion", "3"
    )  # all that a killed promote left
    assert three.rollback(NAME).version == 1


def test_moves_keep_their_order_when_the_clock_is_set_back() -> None:
    _, value = aliases.tag_of("champion", aliases.new_move(None, 1, "before"), {})
    before = f"{aliases.PREFIX}champion.{time.time_ns() + 5 * 3600 * 10**9}-abcdef"
    after, _ = aliases.tag_of("champion", aliases.new_move(1, 2, "after"), {before: value, "other.tag": "x"})
    assert after > before
    assert len(after) == len(before), "they sort as text"


def test_aliases_are_apart(three: Registry) -> None:
    three.promote(NAME, 1)
    three.promote(NAME, 2, alias="candidate")
    assert three.get(NAME, 1).aliases == ("champion",)
    assert three.get(NAME, 2).aliases == ("candidate",)
    assert len(three.history(NAME, "candidate")) == 1


def test_reserved_and_impossible_aliases_are_refused(three: Registry) -> None:
    for alias in ("latest", "Latest", "v9", "a b", "", "1st", "a/b", "x" * 101):
        with pytest.raises(InvalidAliasError):
            three.promote(NAME, 1, alias=alias)
    assert three.get(NAME, 1).aliases == ()


def test_what_does_not_exist_is_named(three: Registry, tmp_path: Path) -> None:
    for act in (
        lambda: three.get(NAME, 9),
        lambda: three.get(NAME, "@champion"),
        lambda: three.get("nobody", 1),
        lambda: three.promote(NAME, 9),
        lambda: three.history("nobody"),
        lambda: three.rollback("nobody"),
        lambda: three.record_metrics(NAME, 9, {"f1": 1.0}),
    ):
        with pytest.raises(UnknownVersionError):
            act()
    with pytest.raises(NothingToRollBackError):
        three.rollback(NAME)
    with pytest.raises(VersionError, match="no model folder"):
        three.register(NAME, base=tmp_path)
    for bad in ("", "a/b", "a b", "@x"):
        with pytest.raises(VersionError):
            three.register(bad, base=tmp_path)
    assert three.versions("nobody") == []


def test_wrong_base_registers_nothing(
    registry: Registry, tiny_model: Path, make_adapter: Callable[[int], Path], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    (other / "generation_config.json").write_text("{}")
    with pytest.raises(WrongBaseError):
        registry.register(NAME, base=other, adapter=make_adapter(1))
    assert registry.names() == []


def test_metrics_are_noted_later(three: Registry) -> None:
    three.record_metrics(NAME, 1, {"exact_match": 0.5, "field_f1": 0.75})
    assert three.get(NAME, 1).metrics == {"exact_match": 0.5, "field_f1": 0.75}


def test_many_promoters_lose_no_move(three: Registry) -> None:
    three.promote(NAME, 1)
    threads = [threading.Thread(target=three.promote, args=(NAME, version)) for version in (2, 3) * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    moves = three.history(NAME)
    assert moves[-1].to_version == three.get(NAME, "@champion").ref.version
    assert all(a.to_version == b.from_version for a, b in pairwise(moves))


def test_server_that_is_down_is_named(settings: Settings) -> None:
    away = settings.model_copy(update={"mlflow_tracking_uri": "http://127.0.0.1:9/mlflow"})
    with pytest.raises(RegistryUnreachableError, match=r"127\.0\.0\.1:9"):
        Registry(away).names()


def test_our_own_server_that_is_down_leaves_the_file(settings: Settings, three: Registry) -> None:
    own = settings.model_copy(update={"mlflow_port": 9, "mlflow_tracking_uri": "http://127.0.0.1:9/mlflow"})
    assert Registry(own).names() == [NAME]
