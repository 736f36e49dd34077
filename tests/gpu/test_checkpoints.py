"""Quantized checkpoints on the GPU: layers stay quantized where a form of ours holds them, and compute what floats compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from engine.build import build_engine
from engine.config import EngineConfig
from engine.memory import held_weight_bytes
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.models.quantized import QuantizedLinear, held_forms
from engine.models.weights import load_weights
from engine.sampling_params import SamplingParams

VALUES: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
SMALL = {**INT4, "group_size": 64}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
DYNAMIC = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}


def stored(weight: Tensor, weights: dict[str, Any]) -> dict[str, Tensor]:
    """A layer's tensors in the compressed-tensors format, by its definition."""
    size = weights.get("group_size", weight.shape[1])
    groups = weight.float().unflatten(1, (-1, size))
    top = 448.0 if weights["type"] == "float" else 2 ** (weights["num_bits"] - 1) - 1
    scales = (groups.abs().amax(-1) / top).bfloat16()
    numbers = (groups / scales.float()[:, :, None]).flatten(1).clamp(-top, top)
    if weights["type"] == "float":
        return {"weight": numbers.to(torch.float8_e4m3fn), "weight_scale": scales}
    if weights["num_bits"] == 8:
        return {"weight": numbers.round().to(torch.int8), "weight_scale": scales}
    words = (numbers.round().int() + 8).unflatten(1, (-1, 8)) << torch.arange(0, 32, 4, dtype=torch.int32)
    packed = words.sum(-1, dtype=torch.int64)
    packed = torch.where(packed >= 2**31, packed - 2**32, packed).int()
    return {"weight_packed": packed, "weight_shape": torch.tensor(weight.shape), "weight_scale": scales}


def write(folder: Path, weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> Path:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**VALUES)).to(torch.bfloat16)
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if value.ndim == 2:
            value.normal_(0.0, (0.35 if "_proj" not in name else 1.5 * value.shape[1] ** -0.5))
        if "_proj" not in name:
            tensors[name] = value.clone()
            continue
        parts = stored(value, weights)
        tensors |= {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in parts.items()}
    kind = (
        "float-quantized"
        if weights["type"] == "float"
        else "int-quantized"
        if weights["num_bits"] == 8
        else "pack-quantized"
    )
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "format": kind}
    quantization = {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    config = {**VALUES, "architectures": ["LlamaForCausalLM"], "quantization_config": quantization}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


CASES = pytest.mark.parametrize(
    ("weights", "inputs", "form"),
    [
        (INT8, None, "int8"),
        (INT4, None, "int4"),
        (SMALL, None, None),
        (FP8, DYNAMIC, "fp8"),
        (FP8, None, None),
    ],
)


@CASES
def test_layers_compute_with_what_the_checkpoint_holds(
    weights: dict[str, Any],
    inputs: dict[str, Any] | None,
    form: str | None,
    device: torch.device,
    tmp_path: Path,
) -> None:
    folder = write(tmp_path, weights, inputs)
    model = ModelConfig.from_folder(folder)
    if form == "fp8" and torch.cuda.get_device_capability(device) < (8, 9):
        form = None
    forms = held_forms(model, dtype=torch.bfloat16, device=device, deterministic=False)

    def load(**settings: Any) -> Decoder:
        decoder = Decoder(model, dtype=torch.bfloat16, device=device, max_positions=64, **settings)
        load_weights(decoder, folder)
        return decoder

    held, floats = load(held_forms=forms), load()
    x = torch.randn(40, 256, device=device, generator=torch.Generator(device).manual_seed(0)).bfloat16()
    for layer, plain in zip(held.layers, floats.layers, strict=True):
        for name in ("qkv", "out", "gate_up"):
            module = getattr(layer, name)
            assert isinstance(module, QuantizedLinear) == (form is not None)
            assert module.weight.values.device.type == "cuda" if form else True
            got, want = module(x).float(), getattr(plain, name)(x).float()
            # bfloat16 of sums of 256 terms; the weights' own rounding to bfloat16, which only floats make; fp8 rounds x to 3 bits.
            scale = want.abs().mean()
            assert (got - want).abs().max() < (0.5 if form == "fp8" else 0.06) * scale


@CASES
def test_an_engine_holds_and_runs_it(
    weights: dict[str, Any],
    inputs: dict[str, Any] | None,
    form: str | None,
    device: torch.device,
    tmp_path: Path,
) -> None:
    folder = write(tmp_path, weights, inputs)
    engine = build_engine(
        EngineConfig(
            model=str(folder),
            dtype="bfloat16",
            device=str(device),
            num_blocks=64,
            max_num_seqs=4,
            max_model_len=128,
        )
    )
    try:
        engine.add(
            engine.make_request((1, 2, 3), SamplingParams(max_tokens=8, temperature=0.0), request_id="x")
        )
        tokens: list[int] = []
        while engine.has_work:
            for delta in engine.step().deltas:
                assert delta.error is None, delta.error
                tokens += delta.token_ids
        assert len(tokens) == 8
        model = ModelConfig.from_folder(folder)
        estimated = held_weight_bytes(model, torch.bfloat16, device)
        rotary = 128 * 64 * 4
        ledger = engine.stats().memory
        assert ledger is not None
        if form != "fp8" or torch.cuda.get_device_capability(device) >= (8, 9):
            assert ledger.weights_bytes == pytest.approx(estimated + rotary, rel=0.02)
    finally:
        engine.close()
