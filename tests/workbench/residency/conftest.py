"""Hosts over the real engine in deterministic mode, and a registry of adapters of the tiny model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig
from workbench.host import EngineHost
from workbench.versions.adapter import is_adapter, read_adapter
from workbench.versions.digest import folder_digest
from workbench.versions.merge import merge, merged_digest
from workbench.versions.ref import ResolvedVersion, VersionRef


class Versions:
    """A registry in memory: versions of the name ``t`` are adapters of one base, or whole models. `cache`: of merged folders."""

    def __init__(self, base: Path, folders: dict[int, Path], cache: Path) -> None:
        self.base, self.folders, self.cache = base, folders, cache
        self.champion = 1

    def __call__(self, ref: str) -> ResolvedVersion:
        what = ref.removeprefix("models:/").removeprefix("t").lstrip("/")
        version = self.champion if what == "@champion" else int(what)
        alias = "champion" if "@" in what else None
        folder = self.folders[version]
        if not is_adapter(folder):
            digest = folder_digest(folder)
            return ResolvedVersion(VersionRef("t", version, alias, digest, digest), folder)
        base_digest, adapter = folder_digest(self.base), read_adapter(folder)
        digest = merged_digest(base_digest, adapter.digest)
        return ResolvedVersion(
            VersionRef("t", version, alias, digest, base_digest, adapter.digest), self.base, folder,
            lambda: merge(self.base, folder, self.cache / digest),
        )  # fmt: skip


def config(model: Path | str, **more: Any) -> EngineConfig:
    """Deterministic: a stream's tokens may not depend on what shares its batch, to the bit."""
    values = {
        "dtype": "float32", "deterministic": True, "device": "cpu", "num_blocks": 512, "num_threads": 1,
        "max_model_len": 512, "max_num_seqs": 32, **more,
    }  # fmt: skip
    return EngineConfig(model=str(model), **values)


@pytest.fixture(scope="session")
def adapter_folders(
    tiny_model: Path, adapter: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[int, Path]:
    """Eight adapters of different ranks and targets."""
    root, base_digest = tmp_path_factory.mktemp("lora"), folder_digest(tiny_model)
    return {
        seed: adapter(
            root / f"a{seed}", seed, rank=2 + seed, part="" if seed % 2 else "attn", base_digest=base_digest
        )
        for seed in range(1, 9)
    }


@pytest.fixture
def versions(tiny_model: Path, adapter_folders: dict[int, Path], tmp_path: Path) -> Versions:
    return Versions(tiny_model, dict(adapter_folders), tmp_path / "merged")


@contextmanager
def run_host(
    model: str | Path,
    versions: Versions,
    *,
    enable_lora: bool | None = None,
    budget: Any = None,
    **settings: Any,
) -> Iterator[EngineHost]:
    made = EngineHost(config(model, **settings), resolver=versions, enable_lora=enable_lora, budget=budget)
    with made as host:
        assert host.wait(120).ready, host.state().message
        yield host


@pytest.fixture
def hosted(tiny_model: Path, versions: Versions) -> Callable[..., Any]:
    """``with hosted(**settings) as host``: a ready host of the test's own, its default the tiny model unless said otherwise."""

    def make(model: str | Path = tiny_model, **settings: Any) -> Any:
        return run_host(model, versions, **settings)

    return make


@pytest.fixture(scope="module")
def shared_host(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[EngineHost, Versions]]:
    """A host for the tests of a module, and its registry: closing an engine costs more than most of them."""
    registry = Versions(tiny_model, {}, tmp_path_factory.mktemp("merged"))
    with run_host(tiny_model, registry) as host:
        yield host, registry


@pytest.fixture
def host(shared_host: tuple[EngineHost, Versions], versions: Versions) -> Iterator[EngineHost]:
    """The module's host with the eight adapters registered and nothing resident but the base."""
    host, registry = shared_host
    registry.folders, registry.champion = versions.folders, 1
    yield host
    for resident in sorted(host.resident(), key=lambda each: each.parent is None):
        if not resident.is_default:
            host.unload(resident.id)
