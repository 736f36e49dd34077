"""What files alone tell of a model: identity, size, and damage that no load need discover."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from engine.errors import CorruptWeightsError, ModelNotFoundError
from workbench.model_card import check_model, read_model_card
from workbench.versions.digest import folder_digest


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def test_the_card_counts_the_parameters_that_are_stored(model: Path) -> None:
    from safetensors.numpy import load_file

    expected = sum(tensor.size for tensor in load_file(model / "model.safetensors").values())
    card = read_model_card(str(model))
    assert (card.num_parameters, card.context) == (expected, 1024)


def test_the_digest_is_of_content_not_of_place(model: Path, tmp_path: Path) -> None:
    digest = folder_digest(model)
    moved = model.rename(tmp_path / "elsewhere")
    assert folder_digest(moved) == digest
    (moved / "README.md").write_text("words about it")
    assert folder_digest(moved) == digest
    weights = moved / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert folder_digest(moved) != digest


def test_a_whole_model_passes(model: Path) -> None:
    check_model(str(model))
    check_model("org/name")  # a hub id: only the download can tell


@pytest.mark.parametrize("path", ["/no/such/folder", "./nothing", "nothing", "a/b/c"])
def test_no_folder_is_refused(path: str) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        check_model(path)
    assert caught.value.value == path
    assert caught.value.remedy


def test_a_folder_without_config_is_refused(model: Path) -> None:
    (model / "config.json").unlink()
    with pytest.raises(ModelNotFoundError, match=r"config\.json"):
        check_model(str(model))


def test_a_truncated_file_is_refused_with_both_sizes(model: Path) -> None:
    weights = model / "model.safetensors"
    size = weights.stat().st_size
    weights.write_bytes(weights.read_bytes()[: size - 100])
    with pytest.raises(CorruptWeightsError) as caught:
        check_model(str(model))
    assert (caught.value.value, caught.value.limit) == (size - 100, size)


@pytest.mark.parametrize("content", [b"", b"\x00" * 4, b"\xff" * 100, b"\x05\0\0\0\0\0\0\0{bad}"])
def test_a_file_that_is_no_safetensors_is_refused(model: Path, content: bytes) -> None:
    (model / "model.safetensors").write_bytes(content)
    with pytest.raises(CorruptWeightsError, match=r"model\.safetensors"):
        check_model(str(model))


def test_a_missing_shard_is_named(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CorruptWeightsError, match="model-00002-of-00002"):
        check_model(str(model))


def test_a_folder_without_weights_is_refused(model: Path) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(CorruptWeightsError):
        check_model(str(model))


def test_a_gguf_file_is_a_model_of_its_own(tmp_path: Path, tiny_model: Path) -> None:
    from engine.bench.parts.cpu_peers import write_gguf

    file = tmp_path / "tiny.gguf"
    write_gguf(tiny_model, file, "f16", tiny_model / "tokenizer.json")
    check_model(str(file))
    check_model(str(tmp_path))
    card = read_model_card(str(tmp_path))
    assert card == read_model_card(str(file))
    assert (card.id, card.context, card.digest) == ("tiny", 1024, folder_digest(file))
    assert card.num_parameters == read_model_card(str(tiny_model)).num_parameters
    file.write_bytes(file.read_bytes()[:-64])
    with pytest.raises(CorruptWeightsError, match=r"tiny\.gguf"):
        check_model(str(file))
