"""GPTQ and AWQ checkpoints that AutoGPTQ and AutoAWQ wrote hold the weights that those libraries make of them, to the bit."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.errors import CorruptWeightsError, UnsupportedModelError
from engine.kernels.quantized_weight import Int4Weight
from engine.models.config import ModelConfig
from engine.models.quantized import QuantizedLinear
from engine.quantization.checkpoint import LinearFormat
from engine.quantization.gptq import unpack
from engine.quantization.stored_weight import StoredWeight

HERE = Path(__file__).parent
WRITTEN = HERE / "written"
NAMES = sorted(path.name for path in WRITTEN.iterdir())
MISSING = [name for name in ("auto_gptq", "awq") if importlib.util.find_spec(name) is None]
Q_PROJ = "model.layers.0.self_attn.q_proj"


def copy(name: str, folder: Path, change: Callable[[dict[str, Tensor]], Any], **settings: Any) -> Path:
    """A written checkpoint with changed tensors and changed entries of its quantization_config."""
    shutil.copytree(WRITTEN / name, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= settings
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_those_that_the_format_s_own_library_makes(
    name: str, loaded_weights: Callable[..., dict[str, Tensor]]
) -> None:
    weights = loaded_weights(WRITTEN / name, torch.float16)
    digests = json.loads((WRITTEN / name / "digests.json").read_text())
    assert len(digests) == (6 if name == "awq" else 7)
    for weight, digest in digests.items():
        assert hashlib.sha256(weights[weight].contiguous().numpy().tobytes()).hexdigest() == digest, weight


def test_layers_that_a_checkpoint_leaves_alone_are_read_as_floats(
    loaded_weights: Callable[..., dict[str, Tensor]],
) -> None:
    stored = load_file(WRITTEN / "awq" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(loaded_weights(WRITTEN / "awq", torch.float16)[name], stored[name])


@pytest.mark.parametrize("name", NAMES)
def test_the_libraries_still_write_these_files(name: str, tmp_path: Path) -> None:
    if MISSING:
        pytest.skip(
            f"{' and '.join(MISSING)} not installed; write_checkpoints.py says how: the stored files are read instead"
        )
    spec = importlib.util.spec_from_file_location("write_checkpoints", HERE / "write_checkpoints.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.write(name, tmp_path)
    assert (tmp_path / "digests.json").read_text() == (WRITTEN / name / "digests.json").read_text()


def test_zero_points_of_the_second_gptq_version_are_taken_as_they_are(
    tmp_path: Path, loaded_weights: Callable[..., dict[str, Tensor]]
) -> None:
    def as_second(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("qzeros")]:
            tensors[name] = tensors[name] + 0x11111111  # one more in each field: none of them is 15

    folder = copy("gptq-4bit-act-order", tmp_path / "v2", as_second, checkpoint_format="gptq_v2")
    want, found = loaded_weights(WRITTEN / "gptq-4bit-act-order"), loaded_weights(folder)
    assert all(torch.equal(found[name], want[name]) for name in want)


def test_a_zero_point_of_none_is_stored_as_the_largest_number() -> None:
    """What the first version stores is one less, and wraps."""
    parts = {
        "qweight": torch.full((1, 8), 0x55555555, dtype=torch.int32),
        "qzeros": torch.full((1, 1), -1, dtype=torch.int32),
        "scales": torch.ones(1, 8, dtype=torch.float16),
    }
    stored = unpack(LinearFormat(scheme="gptq", bits=4), parts, 8, 8)
    assert torch.equal(stored.dequantize(), torch.full((8, 8), 5.0, dtype=torch.float16))


def test_settings_by_name_override_a_checkpoint_s_own(tmp_path: Path) -> None:
    rules = {r"-:.*down_proj": {}, r"+:.*\.0\..*up_proj": {"bits": 8, "group_size": 64}}
    folder = copy("gptq-4bit-act-order", tmp_path / "dynamic", lambda _: None, dynamic=rules)
    quantization = ModelConfig.from_folder(folder).quantization
    assert quantization is not None
    assert quantization.format_of("model.layers.0.mlp.down_proj") is None
    changed, plain = (quantization.format_of(f"model.layers.0.mlp.{x}_proj") for x in ("up", "gate"))
    assert changed is not None
    assert plain is not None
    assert (changed.bits, changed.group_size, plain.bits, plain.group_size) == (8, 64, 4, 32)
    assert quantization.format_of("lm_head") is None


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"bits": 3}, "bits 3"),
        ({"group_size": 0}, "group_size 0"),
        ({"checkpoint_format": "marlin"}, "marlin"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes.*awq, compressed-tensors, fp8, gptq, and GGUF"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "gemv"),
        ({"quant_method": "awq", "bits": 8}, "AWQ checkpoints with bits 8"),
    ],
)
def test_what_is_not_read_is_refused_by_name_before_weights_are(
    tmp_path: Path, settings: dict[str, Any], named: str
) -> None:
    folder = copy("gptq-8bit", tmp_path / "other", lambda _: None, **settings)
    with pytest.raises(UnsupportedModelError, match=named):
        ModelConfig.from_folder(folder)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda tensors: tensors.pop(f"{Q_PROJ}.scales"), rf"1 of .*{Q_PROJ}\.scales"),
        (
            lambda tensors: tensors.update({f"{Q_PROJ}.qweight": torch.zeros(4, 64, dtype=torch.int32)}),
            r"shape \(64, 16\)",
        ),
        (
            lambda tensors: tensors.update({f"{Q_PROJ}.scales": torch.zeros(1, 64).half()}),
            "g_idx names group 1 of 1",
        ),
        (
            lambda tensors: tensors.update({f"{Q_PROJ}.qzeros": torch.zeros(2, 7, dtype=torch.int32)}),
            "qzeros",
        ),
        (lambda tensors: tensors.update({f"{Q_PROJ}.bias": torch.ones(64).half()}), r"q_proj\.bias"),
    ],
)
def test_tensors_that_make_no_weight_are_named(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], named: str, load_decoder: Callable[..., Any]
) -> None:
    folder = copy("gptq-8bit", tmp_path / "broken", change)
    with pytest.raises((CorruptWeightsError, UnsupportedModelError), match=named):
        load_decoder(folder)


def stored(in_features: int, group_size: int, **changes: Any) -> StoredWeight:
    generator = torch.Generator().manual_seed(in_features)
    groups = -(-in_features // group_size)
    scales = torch.rand(6, groups, generator=generator).half() + 0.01
    values, zeros = (torch.randint(0, 16, (6, n), generator=generator).short() for n in (in_features, groups))
    return StoredWeight(
        **{"values": values, "scales": scales, "zeros": zeros, "group_size": group_size, **changes}
    )


@pytest.mark.parametrize(
    ("in_features", "group_size"), [(256, 128), (256, 256), (200, 200), (512, 256), (200, 128)]
)
def test_our_own_int4_holds_the_same_numbers_and_scales(in_features: int, group_size: int) -> None:
    weight = stored(in_features, group_size)
    weight = replace(weight, values=weight.values.t().contiguous().t())  # as AWQ's come out of their words
    fused = weight.fuse()
    assert isinstance(fused, Int4Weight)
    assert fused.values.is_contiguous()
    # Ours multiplies in float32; the formats' libraries round the same product once, to the scales' dtype.
    assert torch.equal(fused.dequantize().half(), weight.dequantize())


@pytest.mark.parametrize(
    "weight",
    [
        stored(128, 64),
        stored(256, 128, group_of=torch.arange(256).flip(0) // 128),
        stored(256, 128, values=torch.full((6, 256), 16, dtype=torch.int16)),
    ],
)
def test_what_our_own_forms_do_not_hold_is_not_forced_into_them(weight: StoredWeight) -> None:
    assert weight.fuse() is None


def test_a_decoder_that_holds_int4_keeps_what_fits_and_makes_floats_of_the_rest(
    load_decoder: Callable[..., Any],
) -> None:
    """Rows of one group fit ours of 128 inputs; groups of 32 do not."""
    held = frozenset({"int4"})
    kept = load_decoder(WRITTEN / "gptq-4bit-symmetric-row", torch.float16, held_forms=held).layers[0]
    plain = load_decoder(WRITTEN / "gptq-4bit-symmetric-row", torch.float16).layers[0]
    for name in ("qkv", "out", "gate_up", "down"):
        module = getattr(kept, name)
        assert isinstance(module, QuantizedLinear), name
        assert torch.equal(module.weight.dequantize().half(), getattr(plain, name).weight)
    again = load_decoder(WRITTEN / "awq", torch.float16, held_forms=held).layers[0]
    floats = load_decoder(WRITTEN / "awq", torch.float16).layers[0]
    for name in ("qkv", "out", "gate_up", "down"):
        assert torch.equal(getattr(again, name).weight, getattr(floats, name).weight)
