"""A version is found by what its files hold: it survives moves, and refuses what was changed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from workbench.settings import Settings
from workbench.versions import resolve
from workbench.versions.digest import folder_digest
from workbench.versions.errors import AdapterError, MissingWeightsError, UnknownVersionError
from workbench.versions.merge import is_merged
from workbench.versions.ref import parse_address
from workbench.versions.registry import Registry
from workbench.versions.weights import digest_of, find_weights

NAME = "extractor"


@pytest.fixture
def place(tiny_model: Path, make_adapter: Callable[[int], Path], tmp_path: Path) -> Path:
    """A folder of somebody's with base and adapter, to be moved and broken."""
    shutil.copytree(tiny_model, tmp_path / "place" / "base")
    shutil.copytree(make_adapter(1), tmp_path / "place" / "adapter")
    return tmp_path / "place"


@pytest.fixture
def registered(registry: Registry, place: Path) -> Registry:
    registry.register(NAME, base=place / "base", adapter=place / "adapter")
    registry.register("tiny", base=place / "base")
    registry.promote(NAME, 1)
    return registry


def test_every_way_to_write_it(registered: Registry, settings: Settings) -> None:
    for ref in (f"{NAME}@champion", f"{NAME}/1", f"models:/{NAME}@champion", f"models:/{NAME}/1"):
        found = resolve(ref, settings)
        assert found.ref.id == f"{NAME}/1"
        assert found.ref.alias == ("champion" if "@" in ref else None)
        assert found.folder == settings.home_dir / "cache" / "merged" / found.ref.digest
        assert is_merged(found.folder)


def test_alias_is_asked_anew_each_time(
    registered: Registry, settings: Settings, place: Path, make_adapter: Callable[[int], Path]
) -> None:
    first = resolve(f"{NAME}@champion", settings)
    registered.register(NAME, base=place / "base", adapter=make_adapter(2))
    registered.promote(NAME, 2)
    second = resolve(f"{NAME}@champion", settings)
    assert (first.ref.version, second.ref.version) == (1, 2)
    assert folder_digest(first.folder) != folder_digest(second.folder)
    registered.rollback(NAME)
    assert resolve(f"{NAME}@champion", settings) == first


def test_moved_folders_are_found_by_digest(registered: Registry, settings: Settings, place: Path) -> None:
    (settings.home_dir / "models").mkdir()
    (place / "base").rename(settings.home_dir / "models" / "any-name")
    shutil.rmtree(place / "adapter")  # the registry has it as an artifact
    assert resolve("tiny/1", settings).folder == settings.home_dir / "models" / "any-name"
    assert is_merged(resolve(f"{NAME}/1", settings).folder)
    assert len(list((settings.home_dir / "cache" / "adapters").iterdir())) == 1


def test_missing_weights_are_named_by_digest(
    registered: Registry, settings: Settings, place: Path, tiny_model: Path
) -> None:
    shutil.rmtree(place / "base")
    for ref in ("tiny/1", f"{NAME}/1"):
        with pytest.raises(MissingWeightsError) as caught:
            resolve(ref, settings)
        assert caught.value.value == folder_digest(tiny_model)
        assert str(place / "base") in str(caught.value)


def test_changed_weights_are_refused(
    registered: Registry, settings: Settings, place: Path, tiny_model: Path
) -> None:
    weights = place / "base" / "model.safetensors"
    stat = weights.stat()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(MissingWeightsError) as caught:
        resolve("tiny/1", settings)
    assert folder_digest(tiny_model) in str(caught.value)
    assert folder_digest(place / "base") in str(caught.value)


def test_changed_weights_are_seen_behind_a_remembered_digest(
    settings: Settings, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workbench.versions.weights._REMEMBERED_FROM_BYTES", 1)
    before = digest_of(place / "base", settings)
    assert before == digest_of(place / "base", settings) == folder_digest(place / "base")
    assert len(list((settings.home_dir / "cache" / "digests").iterdir())) == 1
    weights = place / "base" / "model.safetensors"
    stat = weights.stat()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert digest_of(place / "base", settings) == folder_digest(place / "base") != before


def test_damaged_cache_is_made_again(registered: Registry, settings: Settings) -> None:
    found = resolve(f"{NAME}/1", settings)
    digest = folder_digest(found.folder)
    (found.folder / "model.safetensors").write_bytes(b"short")
    assert folder_digest(resolve(f"{NAME}/1", settings).folder) == digest


def test_folders_and_adapter_folders(settings: Settings, place: Path) -> None:
    whole = resolve(str(place / "base"), settings)
    assert (whole.folder, whole.ref.digest) == (place / "base", folder_digest(place / "base"))
    with pytest.raises(MissingWeightsError):
        resolve(str(place / "adapter"), settings)
    (settings.home_dir / "models").mkdir()
    shutil.copytree(place / "base", settings.home_dir / "models" / "base")
    tuned = resolve(str(place / "adapter"), settings)
    assert tuned.ref.base_digest == whole.ref.digest
    assert is_merged(tuned.folder)


def test_adapter_that_does_not_name_its_base_needs_to_be_registered(settings: Settings, place: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = place / "adapter" / "adapter_model.safetensors"
    save_file(load_file(weights), weights)
    with pytest.raises(AdapterError, match="which base"):
        resolve(str(place / "adapter"), settings)


def test_unknown_references_are_refused(three: Registry, settings: Settings) -> None:
    for ref in ("nobody@champion", "nobody/1", f"{NAME}@nothing", f"{NAME}/7", "models:/x", "models:/"):
        with pytest.raises(UnknownVersionError):
            resolve(ref, settings)


@pytest.mark.parametrize(
    "text", ["org/name", "data/models", "name", "/abs/3x", "a/b/3", "name@", "@champion", "org/name@x"]
)
def test_other_texts_are_no_registry_addresses(text: str) -> None:
    assert parse_address(text) is None


def test_find_weights_ignores_what_it_cannot_read(settings: Settings, tmp_path: Path) -> None:
    broken = settings.home_dir / "models" / "broken"
    broken.mkdir(parents=True)
    (broken / "adapter_config.json").write_text("{}")
    with pytest.raises(MissingWeightsError, match="never known"):
        find_weights("0" * 64, settings, what="nothing")
