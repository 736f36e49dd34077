"""Checkpoints load from one file, shards and tied files alike, and every damage has a typed error that names the file."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.build import build_engine
from engine.config import EngineConfig
from engine.errors import CorruptWeightsError, ModelLoadError, ModelNotFoundError, UnsupportedModelError
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.models.weight_copies import WeightCopies
from engine.models.weights import load_weights
from engine.sampling_params import SamplingParams

CPU = torch.device("cpu")


def decoder_for(folder: Path, dtype: torch.dtype = torch.float64) -> Decoder:
    return Decoder(ModelConfig.from_folder(folder), dtype=dtype, device=CPU, max_positions=8)


@pytest.fixture
def tiny(tiny_models: Callable[[str], Any]) -> Any:
    return tiny_models("llama2_mha_untied")


@pytest.fixture
def sharded(tiny: Any, tmp_path: Path) -> Path:
    """The tiny model in at least three shards with an index."""
    tiny.reference.save_pretrained(tmp_path / "sharded", max_shard_size="150KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) >= 3
    return tmp_path / "sharded"


def test_shards_give_the_same_weights_as_one_file(tiny: Any, sharded: Path) -> None:
    one, many = decoder_for(tiny.folder), decoder_for(sharded)
    load_weights(one, tiny.folder)
    load_weights(many, sharded)
    for (name, a), (_, b) in zip(one.named_parameters(), many.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_every_value_lands_where_it_belongs_in_the_merged_matrices(tiny: Any) -> None:
    decoder = decoder_for(tiny.folder)
    for parameter in decoder.parameters():
        parameter.fill_(float("nan"))
    load_weights(decoder, tiny.folder)
    state = tiny.reference.state_dict()
    layer: Any = decoder.layers[1]
    part = "model.layers.1.self_attn."
    assert torch.equal(layer.qkv.weight, torch.cat([state[f"{part}{x}_proj.weight"] for x in "qkv"]))
    assert torch.equal(layer.down.weight, state["model.layers.1.mlp.down_proj.weight"])
    assert not any(parameter.isnan().any() for parameter in decoder.parameters())
    assert sum(p.numel() for p in decoder.parameters()) == decoder.config.num_parameters


def test_tied_embeddings_are_one_tensor_and_a_stored_head_is_ignored(
    tiny_models: Callable[[str], Any], tmp_path: Path
) -> None:
    tiny = tiny_models("qwen2_bias_window")
    decoder = decoder_for(tiny.folder)
    load_weights(decoder, tiny.folder)
    assert decoder.lm_head.weight.data_ptr() == decoder.embedding.data_ptr()
    folder = tiny.copy(tmp_path / "stored")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    again = decoder_for(folder)
    load_weights(again, folder)
    assert torch.equal(again.lm_head.weight, decoder.embedding)


def test_weights_are_converted_to_the_compute_dtype(tiny: Any) -> None:
    decoder = decoder_for(tiny.folder, torch.bfloat16)
    load_weights(decoder, tiny.folder)
    assert torch.equal(decoder.embedding, tiny.reference.state_dict()["model.embed_tokens.weight"].bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_in_pieces_by_threads_fill_every_place(dtype: torch.dtype) -> None:
    """Pieces of 64 bytes: more than may wait, tensors that end within one, and views of one matrix."""
    sizes = [(1,), (16,), (17, 3), (0, 5), (40, 40), (2, 3, 4)]
    sources = [torch.randn(size) for size in sizes]
    merged = torch.full((90, 40), float("nan"), dtype=dtype)
    targets = [torch.full(size, float("nan"), dtype=dtype) for size in sizes]
    with WeightCopies(CPU, num_threads=3, piece_bytes=64) as copies:
        for source, target in zip(sources, targets, strict=True):
            copies.copy(source, target)
        copies.copy(sources[4], merged[10:50])
    for source, target in zip(sources, targets, strict=True):
        assert torch.equal(target, source.to(dtype))
    assert torch.equal(merged[10:50], sources[4].to(dtype))
    assert merged[:10].isnan().all()
    assert merged[50:].isnan().all()


@pytest.mark.parametrize("num_after", [0, 100])
def test_a_copy_that_fails_is_told_and_no_thread_stays(num_after: int) -> None:
    before = threading.active_count()
    with (
        pytest.raises(RuntimeError, match="meta tensor"),
        WeightCopies(CPU, num_threads=2, piece_bytes=64) as copies,
    ):
        meta = torch.empty(16, device="meta")
        copies.copy(meta, torch.empty(16))  # cannot be read
        for _ in range(num_after):
            copies.copy(torch.ones(16), torch.empty(16))
    assert threading.active_count() == before


def test_progress_rises_to_one(tiny: Any) -> None:
    shares: list[float] = []
    load_weights(decoder_for(tiny.folder), tiny.folder, lambda message, share: shares.append(share))
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_a_missing_shard_is_named(sharded: Path) -> None:
    victim = sorted(sharded.glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(CorruptWeightsError, match=victim.name) as caught:
        load_weights(decoder_for(sharded), sharded)
    assert caught.value.remedy
    assert "Download" in str(caught.value)


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_a_truncated_file_is_named(tiny: Any, tmp_path: Path, keep: int) -> None:
    folder = tiny.copy(tmp_path / "cut")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CorruptWeightsError, match=r"model\.safetensors.*truncated"):
        load_weights(decoder_for(folder), folder)


def test_a_file_of_garbage_is_named(tiny: Any, tmp_path: Path) -> None:
    folder = tiny.copy(tmp_path / "garbage")
    (folder / "model.safetensors").write_bytes(b"<html>not found</html>" * 100)
    with pytest.raises(CorruptWeightsError, match=r"model\.safetensors"):
        load_weights(decoder_for(folder), folder)


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_a_wrong_shape_names_tensor_and_both_shapes(tiny: Any, tmp_path: Path) -> None:
    folder = tiny.copy(tmp_path / "shape")
    name = "model.layers.0.self_attn.k_proj.weight"
    change_tensors(folder, lambda tensors: tensors.update({name: tensors[name][:-4].contiguous()}))
    with pytest.raises(CorruptWeightsError, match=r"layers\.0\.self_attn\.k_proj.*\(44, 48\).*\(48, 48\)"):
        load_weights(decoder_for(folder), folder)


def test_a_missing_tensor_is_named(tiny: Any, tmp_path: Path) -> None:
    folder = tiny.copy(tmp_path / "missing")
    change_tensors(folder, lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
    with pytest.raises(CorruptWeightsError, match=r"1 of .*layers\.2\.mlp\.up_proj\.weight"):
        load_weights(decoder_for(folder), folder)


def test_a_tensor_without_a_place_is_named(tiny: Any, tmp_path: Path) -> None:
    folder = tiny.copy(tmp_path / "extra")
    change_tensors(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.sinks": torch.zeros(4)}))
    with pytest.raises(UnsupportedModelError, match=r"self_attn\.sinks"):
        load_weights(decoder_for(folder), folder)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    tensors = load_file(first)
    name = next(iter(load_file(second)))
    save_file({**tensors, name: load_file(second)[name]}, first)
    with pytest.raises(CorruptWeightsError, match=f"{name}.*again"):
        load_weights(decoder_for(sharded), sharded)


def test_integer_weights_are_refused(tiny: Any, tmp_path: Path) -> None:
    folder = tiny.copy(tmp_path / "int8")
    name = "model.layers.0.mlp.down_proj.weight"
    change_tensors(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    with pytest.raises(UnsupportedModelError, match="int8"):
        load_weights(decoder_for(folder), folder)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../../etc/passwd"}}']
)
def test_a_broken_index_is_named(sharded: Path, content: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CorruptWeightsError, match=r"index\.json"):
        load_weights(decoder_for(sharded), sharded)


def test_pickled_weights_alone_are_refused_with_the_way_out(tiny: Any, tmp_path: Path) -> None:
    folder = tiny.copy(tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedModelError, match="save_pretrained"):
        load_weights(decoder_for(folder), folder)


def test_a_folder_without_weights_or_config_is_not_found(tiny: Any, tmp_path: Path) -> None:
    folder = tiny.copy(tmp_path / "empty")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match="safetensors"):
        build_engine(EngineConfig(model=str(folder), num_blocks=8, max_model_len=32))
    shutil.rmtree(folder)
    with pytest.raises(ModelNotFoundError, match="no model folder"):
        build_engine(EngineConfig(model=str(folder)))
    folder.mkdir()
    with pytest.raises(ModelNotFoundError, match=r"config\.json"):
        build_engine(EngineConfig(model=str(folder)))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ({"architectures": []}, "architecture none"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
        ({"head_dim": 13}, "head_dim 13"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        (
            {"architectures": ["Qwen3ForCausalLM"], "layer_types": ["linear_attention"] * 3},
            "linear_attention",
        ),
        ({"architectures": ["MistralForCausalLM"], "attention_bias": True}, "attention_bias"),
    ],
)
def test_what_no_model_path_has_is_refused_by_name_before_weights_are_read(
    tiny: Any, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    folder = tiny.copy(tmp_path / "changed", **changes)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModelError, match=named):
        build_engine(EngineConfig(model=str(folder)))


@pytest.mark.parametrize("content", ["{", '{"architectures": ["LlamaForCausalLM"]}', '{"architectures": "x"'])
def test_a_broken_config_is_a_load_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        build_engine(EngineConfig(model=str(tmp_path)))


def test_shards_run(tiny: Any, sharded: Path, run_engine: Callable[..., Any]) -> None:
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    prompts = {"x": [3, 1, 4, 1, 5]}
    assert json.loads((sharded / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert run_engine(sharded, prompts, params).tokens == run_engine(tiny.folder, prompts, params).tokens
