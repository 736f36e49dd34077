"""An alias that was moved in the registry is what the running host serves, within seconds; a registry that fails changes nothing."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.sampling_params import SamplingParams
from workbench.alias_watcher import AliasWatcher, registry_lookup
from workbench.errors import UnknownModelError
from workbench.host import EngineHost, fake_worker
from workbench.ports import free_port
from workbench.settings import FAKE_MODEL, Settings
from workbench.versions.ref import ResolvedVersion, VersionRef

CHAMPION = "tickets@champion"


class FakeRegistry:
    """One alias of one name, and how well the registry is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.champion: int | None = None
        self.down = False
        self.broken: set[int] = set()
        self.resolved: list[int] = []

    def lookup(self, name: str, alias: str) -> int | None:
        if self.down:
            raise ConnectionError("refused")
        return self.champion if (name, alias) == ("tickets", "champion") else None

    def resolve(self, ref: str) -> Any:
        version = int(ref.rpartition("/")[2])
        self.resolved.append(version)
        if version in self.broken:
            raise UnknownModelError(f"weights digest-{version} are not here", value=version)
        return ResolvedVersion(VersionRef("tickets", version, None, f"digest-{version}", ""), self.folder)


@pytest.fixture
def registry(tmp_path: Path) -> FakeRegistry:
    return FakeRegistry(tmp_path)


@pytest.fixture
def host(registry: FakeRegistry) -> Iterator[EngineHost]:
    made = EngineHost(
        EngineConfig(model=FAKE_MODEL), factory=partial(fake_worker, delay_s=0.0), resolver=registry.resolve
    )
    with made:
        assert made.wait(20).ready
        yield made


def test_an_alias_is_followed_from_nothing_over_moves_to_its_removal(
    host: EngineHost, registry: FakeRegistry
) -> None:
    watcher = AliasWatcher(host, registry.lookup, [CHAMPION])

    def state() -> tuple[int | None, int | None, str | None]:
        watcher.poll()
        [followed] = host.followed()
        return followed.registry_version, followed.serving_version, followed.error

    assert state() == (None, None, None)
    with pytest.raises(UnknownModelError):
        host.worker(CHAMPION)
    for version in (1, 4, 3):
        registry.champion = version
        assert state() == (version, version, None)
        assert host.worker(CHAMPION) is host.worker(f"tickets/{version}")
    registry.champion = None
    assert state() == (None, 3, None), "what is served goes on being served"
    assert host.worker(CHAMPION)
    assert registry.resolved == [1, 4, 3], "an alias that stands still costs no load"


def test_a_silent_registry_changes_nothing_and_is_logged_once(
    host: EngineHost, registry: FakeRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    reached: list[bool] = []
    watcher = AliasWatcher(host, registry.lookup, [CHAMPION], on_reachable=lambda: reached.append(True))
    registry.down = True
    watcher.poll()
    assert not reached
    assert host.followed()[0].error is None, "it is only starting"
    registry.down, registry.champion = False, 2
    watcher.poll()
    registry.down = True
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            watcher.poll()
    assert len(caplog.records) == 1
    [followed] = host.followed()
    assert (followed.registry_version, followed.serving_version) == (2, 2)
    assert "does not answer" in (followed.error or "")
    assert host.worker(CHAMPION)
    registry.down = False
    watcher.poll()
    assert host.followed()[0].error is None
    assert reached == [True]


def test_a_version_that_cannot_be_loaded_is_told_and_the_former_goes_on(
    host: EngineHost, registry: FakeRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    watcher = AliasWatcher(host, registry.lookup, [CHAMPION])
    registry.champion = 3
    watcher.poll()
    registry.champion, registry.broken = 4, {4}
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            watcher.poll()
    [followed] = host.followed()
    assert (followed.registry_version, followed.serving_version) == (4, 3)
    assert "digest-4" in (followed.error or "")
    assert host.worker(CHAMPION) is host.worker("tickets/3")
    assert registry.resolved == [3, 4], "not tried again at every poll"
    assert len(caplog.records) == 1
    registry.champion = 5
    watcher.poll()
    [followed] = host.followed()
    assert (followed.serving_version, followed.error) == (5, None)


def test_without_followed_aliases_the_registry_is_still_found(
    host: EngineHost, registry: FakeRegistry
) -> None:
    reached: list[bool] = []
    AliasWatcher(host, registry.lookup, on_reachable=lambda: reached.append(True)).poll()
    assert reached == [True]


def test_an_alias_loaded_by_hand_is_watched_too(host: EngineHost, registry: FakeRegistry) -> None:
    registry.champion = 2
    watcher = AliasWatcher(host, registry.lookup)
    host.serve(CHAMPION, 1)
    watcher.poll()
    assert host.followed()[0].serving_version == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's, of its own use of SQLAlchemy
def test_an_alias_moved_in_mlflow_reaches_the_running_engine_within_five_seconds(
    tiny_model: Path, other_model: Path, tmp_path: Path
) -> None:
    """MLflow's own store and client, real engines, real weights."""
    from mlflow import MlflowClient

    from workbench.versions import resolve
    from workbench.versions.registry import Registry

    uri = f"sqlite:///{tmp_path / 'mlflow' / 'mlflow.db'}"
    settings = Settings(
        home_dir=tmp_path, mlflow_port=free_port()
    )  # as `quire serve`: no server, MLflow's file alone
    lookup = registry_lookup(settings)
    with pytest.raises(FileNotFoundError):
        lookup("tickets", "champion")
    registry = Registry(settings)
    refs = [registry.register("tickets", base=folder) for folder in (tiny_model, other_model)]
    registry.promote("tickets", refs[0].version, alias="champion")
    config = EngineConfig(model=str(tiny_model), dtype="float32", device="cpu", num_blocks=64, num_threads=1)
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    with EngineHost(config, resolver=lambda ref: resolve(ref, settings)) as host:
        assert host.wait(120).ready
        watcher = AliasWatcher(host, lookup, [CHAMPION])
        watcher.start()
        try:
            answers = {}
            for version in (1, 2, 1):
                began = time.monotonic()
                client.set_registered_model_alias("tickets", "champion", str(version))
                while not (host.followed() and host.followed()[0].serving_version == version):
                    waited = time.monotonic() - began
                    assert waited < (5.0 if answers else 30.0), (
                        "the first one imports MLflow and opens its store"
                    )
                    time.sleep(0.02)
                params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
                told = host.worker(CHAMPION).submit([20, 21, 22], params).result(60).token_ids
                assert answers.setdefault(version, told) == told
            assert answers[1] != answers[2]
            by_id = {resident.id: resident for resident in host.resident()}
            assert by_id["tickets/1"].digest == refs[0].digest
        finally:
            watcher.close()
