"""Checkpoints that compressed-tensors wrote hold the weights that it makes of them, to the bit; so do blocks of fp8."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file
from torch import Tensor
from transformers import FineGrainedFP8Config, LlamaConfig, LlamaForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

from engine.build import build_engine
from engine.config import EngineConfig
from engine.errors import ConfigError, UnsupportedModelError
from engine.kernels.quantized_weight import Fp8Weight, Int8Weight
from engine.models.config import ModelConfig
from engine.models.quantized import QuantizedLinear

VALUES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": False,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
DYNAMIC = {"num_bits": 8, "strategy": "token", "dynamic": True}
# name -> weights, inputs
SCHEMES: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "int4-symmetric": ({**INT4, "symmetric": True}, None),
    "int4-zeros": ({**INT4, "symmetric": False}, None),
    "int4-rows-zeros": ({"num_bits": 4, "type": "int", "strategy": "channel", "symmetric": False}, None),
    "w8a16": ({"num_bits": 8, "type": "int", "strategy": "channel"}, None),
    "w8a8": ({"num_bits": 8, "type": "int", "strategy": "channel"}, {**DYNAMIC, "type": "int"}),
    "w8a8-zeros": ({"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": False}, {**DYNAMIC, "type": "int"}),
    "fp8-rows": ({"num_bits": 8, "type": "float", "strategy": "channel"}, {**DYNAMIC, "type": "float"}),
    "fp8-tensor": ({"num_bits": 8, "type": "float", "strategy": "tensor"}, {**DYNAMIC, "type": "float"}),
}  # fmt: skip


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**VALUES)).to(torch.bfloat16)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(0.0, 1.5 / parameter.shape[1] ** 0.5)
    return model


def set_scales(module: Any) -> None:
    """What a calibration without data gives: the range of each group's values."""
    args, weight = module.quantization_scheme.weights, module.weight.data
    parts = {"group": weight.unflatten(1, (-1, args.group_size or 1)), "tensor": weight.flatten()}.get(
        args.strategy, weight
    )
    dims = {"channel": {"dim": -1, "keepdim": True}, "group": {"dim": -1}}.get(args.strategy, {})
    scales, zeros = calculate_qparams(parts.amin(**dims), parts.amax(**dims), args)
    module.weight_scale.data.copy_(scales)
    if hasattr(module, "weight_zero_point"):
        module.weight_zero_point.data.copy_(zeros)


def write(name: str, folder: Path) -> dict[str, Tensor]:
    """A checkpoint of one scheme; what the library makes of its weights, by name."""
    weights, inputs = SCHEMES[name]
    scheme = QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(**weights),
        input_activations=None if inputs is None else QuantizationArgs(**inputs),
    )  # fmt: skip
    model = make_model()
    ignored = ["lm_head", "re:.*gate_proj"]
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=ignored))
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            set_scales(module)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    compressor.decompress_model(model)
    return {key: value for key, value in model.state_dict().items() if key.endswith("weight")}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, Tensor]]]:
    made: dict[str, tuple[Path, dict[str, Tensor]]] = {}

    def get(name: str) -> tuple[Path, dict[str, Tensor]]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = folder, write(name, folder)
        return made[name]

    return get


@pytest.mark.parametrize("name", SCHEMES)
def test_weights_are_those_that_the_library_decompresses(
    name: str, written: Callable[..., Any], loaded_weights: Callable[..., dict[str, Tensor]]
) -> None:
    folder, reference = written(name)
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert quantization["quant_method"] == "compressed-tensors"
    found = loaded_weights(folder, torch.bfloat16)
    original = make_model().state_dict()
    assert set(found) == set(reference)
    for key, weight in reference.items():
        assert torch.equal(found[key], weight), key
    changed = {key for key in original if not torch.equal(found[key], original[key])}
    assert changed == {key for key in found if "_proj" in key and "gate" not in key}


@pytest.mark.parametrize("name", ["int4-zeros", "w8a8-zeros", "fp8-rows"])
def test_logits_are_those_of_a_plain_checkpoint_with_the_decompressed_weights(
    name: str,
    written: Callable[..., Any],
    tmp_path: Path,
    load_decoder: Callable[..., Any],
    decoder_logits: Callable[..., Tensor],
) -> None:
    folder, reference = written(name)
    values = json.loads((folder / "config.json").read_text())
    del values["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    save_file({key: value.contiguous() for key, value in reference.items()}, tmp_path / "model.safetensors")
    tokens = [3, 1, 4, 1, 5, 92, 65, 35]
    ours, plain = (decoder_logits(load_decoder(each), tokens) for each in (folder, tmp_path))
    assert torch.equal(ours, plain)
    with torch.no_grad():
        model = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, attn_implementation="eager")
        peer = model(torch.tensor([tokens])).logits[0]
    # float64 throughout, but transformers makes its rotary table and its norm's sums in float32
    torch.testing.assert_close(ours, peer, rtol=1e-4, atol=1e-5)


def test_an_engine_answers_from_a_quantized_checkpoint(written: Callable[..., Any]) -> None:
    folder, _ = written("int4-zeros")
    engine = build_engine(EngineConfig(model=str(folder), num_blocks=8, max_model_len=32, num_threads=1))
    engine.close()
    with pytest.raises(ConfigError, match=r"compressed-tensors.*Leave quantization out"):
        build_engine(EngineConfig(model=str(folder), num_blocks=8, quantization="int8"))


def test_rows_of_bytes_and_of_fp8_are_held_as_they_are(
    written: Callable[..., Any], load_decoder: Callable[..., Any]
) -> None:
    for name, form, kind in (
        ("w8a16", "int8", Int8Weight),
        ("fp8-rows", "fp8", Fp8Weight),
        ("fp8-tensor", "fp8", Fp8Weight),
    ):
        folder, reference = written(name)
        layer = load_decoder(folder, torch.bfloat16, held_forms=frozenset({form})).layers[0]
        assert isinstance(layer.qkv, QuantizedLinear)
        assert isinstance(layer.qkv.weight, kind)
        want = torch.cat([reference[f"model.layers.0.self_attn.{x}_proj.weight"] for x in "qkv"])
        assert torch.equal(layer.qkv.weight.dequantize().bfloat16(), want)
        assert not isinstance(layer.gate_up, QuantizedLinear), "half of it is not quantized"
        gate = reference["model.layers.0.mlp.gate_proj.weight"]
        assert torch.equal(layer.gate_up.weight[:96], gate)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"format": "nvfp4-pack-quantized"}, "nvfp4"),
        ({"weights": {"num_bits": 3, "type": "int", "strategy": "group"}}, "num_bits 3"),
        ({"weights": {"num_bits": 4, "type": "int", "strategy": "tensor_group"}}, "tensor_group"),
        ({"weights": None}, "config_groups"),
    ],
)
def test_schemes_that_are_not_read_are_refused_by_name(change: dict[str, Any], named: str) -> None:
    group = {"targets": ["Linear"], "format": "pack-quantized", "weights": INT4, **change}
    values = {**VALUES, "architectures": ["LlamaForCausalLM"]}
    quantization = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    with pytest.raises(UnsupportedModelError, match=named):
        ModelConfig.from_dict({**values, "quantization_config": quantization})


def test_fp8_by_blocks_is_what_transformers_makes_of_it(
    tmp_path: Path, loaded_weights: Callable[..., dict[str, Tensor]]
) -> None:
    class Quantizer:
        quantization_config = FineGrainedFP8Config(
            weight_block_size=(32, 16), modules_to_not_convert=["v_proj"]
        )

    model, tensors, reference = make_model(), {}, {}
    writer, reader = Fp8Quantize(Quantizer()), Fp8Dequantize(Quantizer())
    for name, value in model.state_dict().items():
        if "_proj" not in name or "v_proj" in name:
            tensors[name] = reference[name] = value
            continue
        parts = writer._quantize_one(name, value)
        tensors |= parts
        reference[name] = reader._dequantize_one(*parts.values())
    assert "model.layers.0.mlp.up_proj.weight_scale_inv" in tensors
    save_file(tensors, tmp_path / "model.safetensors")
    config = {
        **VALUES,
        "architectures": ["LlamaForCausalLM"],
        "quantization_config": Quantizer.quantization_config.to_dict(),
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = loaded_weights(tmp_path, torch.float32)
    for name, value in reference.items():
        assert torch.equal(found[name], value.float()), name


@pytest.mark.parametrize("block", [[16, 32], "16x32"])
def test_blocks_of_fp8_are_read_in_compressed_tensors_too(
    block: list[int] | str, tmp_path: Path, loaded_weights: Callable[..., dict[str, Tensor]]
) -> None:
    tensors = dict(make_model().state_dict())
    name = "model.layers.0.mlp.down_proj.weight"
    weight, scales = tensors[name].to(torch.float8_e4m3fn), torch.rand(4, 3).bfloat16()
    save_file(tensors | {name: weight, name + "_scale": scales}, tmp_path / "model.safetensors")
    weights = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": block}
    quantization = {
        "quant_method": "compressed-tensors", "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["re:.*down_proj"], "weights": weights}},
    }  # fmt: skip
    config = {**VALUES, "architectures": ["LlamaForCausalLM"], "quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(config))
    spread = scales.repeat_interleave(16, 0).repeat_interleave(32, 1)
    assert torch.equal(loaded_weights(tmp_path, torch.bfloat16)[name], weight.bfloat16() * spread)


def test_blocks_at_the_edges_may_be_smaller(
    tmp_path: Path, loaded_weights: Callable[..., dict[str, Tensor]]
) -> None:
    """A model whose sizes are no multiples of its blocks: scales are rounded up, as DeepSeek's own kernel reads them."""
    tensors = dict(make_model().state_dict())
    name = "model.layers.0.mlp.down_proj.weight"
    weight = tensors[name].to(torch.float8_e4m3fn)  # [64, 96] by blocks of 40 and 36
    scales = torch.arange(1.0, 7.0).view(2, 3)
    tensors |= {name: weight, name + "_scale_inv": scales}
    save_file(tensors, tmp_path / "model.safetensors")
    quantization = {"quant_method": "fp8", "weight_block_size": [40, 36],
                    "modules_to_not_convert": ["self_attn", "gate_proj", "up_proj"]}  # fmt: skip
    config = {**VALUES, "architectures": ["LlamaForCausalLM"], "quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = loaded_weights(tmp_path)[name]
    for row, column in ((0, 0), (39, 35), (40, 36), (63, 95), (10, 80)):
        assert found[row, column] == weight[row, column].double() * scales[row // 40, column // 36]
