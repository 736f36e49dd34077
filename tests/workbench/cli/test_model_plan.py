"""`quire doctor --model X --gpu-memory N`: what fits, from a config alone, in the engine's own numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import UnsupportedModelError
from engine.kernels.quantized_weight import GROUP
from engine.memory import held_weight_bytes
from engine.models.config import ModelConfig
from engine.models.quantized import QUANTIZERS
from workbench import exit_codes
from workbench.cli import main
from workbench.errors import SettingsError
from workbench.model_plan import make_plan, parse_bytes

GIB = 1 << 30
VALUES = {
    "architectures": ["Qwen3ForCausalLM"], "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "torch_dtype": "bfloat16",
}  # fmt: skip
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A config.json and nothing else."""
    (tmp_path / "config.json").write_text(json.dumps(VALUES))
    return tmp_path


@pytest.mark.parametrize("method", QUANTIZERS)
def test_the_bytes_of_quantized_weights_are_those_that_layers_take(method: str) -> None:
    small = {**VALUES, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 64}  # fmt: skip
    model = ModelConfig.from_dict(small)
    taken = 2 * (model.num_parameters - model.num_layer_products)
    for out, in_features in ((1024, 512), (512, 512), (3072, 512), (512, 1536)):
        weight = QUANTIZERS[method](torch.randn(out, in_features))
        zeros = getattr(weight, "zeros", None)
        parts = (weight.values, weight.scales, *([] if zeros is None else [zeros]))
        taken += model.num_layers * sum(part.nbytes for part in parts)
    estimated = held_weight_bytes(model, torch.bfloat16, torch.device("cuda"), method)
    assert estimated == pytest.approx(taken, rel=0.002)  # the scales of rows longer than the hidden size
    assert held_weight_bytes(model, torch.bfloat16, torch.device("cpu"), method) == 2 * model.num_parameters


@pytest.mark.parametrize(
    ("quantization", "bits"),
    [
        (AWQ, 4 + 3 * 8 / GROUP),
        ({**AWQ, "group_size": 64}, 16),
        ({"quant_method": "gptq", "bits": 4, "group_size": -1}, 4 + 3 * 8 / GROUP),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 16),
    ],
)
def test_a_quantized_checkpoint_is_counted_as_it_is_held(
    folder: Path, quantization: dict[str, Any], bits: float
) -> None:
    (folder / "config.json").write_text(json.dumps({**VALUES, "quantization_config": quantization}))
    plan = make_plan(str(folder), gpu_bytes=80 * GIB)
    assert {row.weights for row in plan.rows} == {"as stored"}
    assert plan.stored_as == quantization["quant_method"]
    model = ModelConfig.from_folder(folder)
    products = model.num_layer_products
    rotary = plan.context * 128 * 4
    want = 2 * (model.num_parameters - products) + products * bits / 8 + rotary
    assert plan.rows[0].weights_bytes == pytest.approx(want, rel=0.001)


def test_what_fits_follows_from_the_numbers_of_the_table(folder: Path) -> None:
    plan = make_plan(str(folder), gpu_bytes=80 * GIB, context=4096)
    assert len(plan.rows) == 12
    by_choice = {(row.weights, row.kv_cache_dtype): row for row in plan.rows}
    plain = by_choice["as stored", "bfloat16"]
    assert plain.kv_bytes_per_token == 2 * 36 * 8 * 128 * 2
    assert by_choice["as stored", "fp8"].kv_bytes_per_token == plain.kv_bytes_per_token // 2
    assert by_choice["as stored", "int8"].kv_bytes_per_token == plain.kv_bytes_per_token // 2 + 2 * 36 * 8 * 4
    for row in plan.rows:
        left = 80 * GIB - row.weights_bytes - row.workspace_bytes
        assert row.num_sequences == row.num_kv_tokens // 4096
        assert row.num_kv_tokens * row.kv_bytes_per_token <= left
        capped = row.num_sequences == 256
        assert capped or row.num_kv_tokens * row.kv_bytes_per_token > 0.95 * left, (
            "most of what is left is used"
        )
    assert by_choice["int4", "fp8"].num_sequences > by_choice["as stored", "bfloat16"].num_sequences


def test_the_command_prints_a_table_and_one_json_object(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["doctor", "--model", str(folder), "--context", "40960", "--home-dir", str(folder / "home")]
    assert main([*command, "--gpu-memory", "16GiB", "--json"]) == 0
    out, err = capsys.readouterr()
    plan = json.loads(out.splitlines()[-1])
    rows = {(row["weights"], row["kv_cache_dtype"]): row for row in plan["rows"]}
    assert rows["int4", "bfloat16"]["num_sequences"] == 1
    assert rows["as stored", "bfloat16"]["num_sequences"] == 0
    assert "one sequence needs" in rows["as stored", "bfloat16"]["problem"]
    assert "8.19 B parameters" in err
    assert "40960" in err
    assert main([*command, "--gpu-memory", "4GiB"]) == exit_codes.FAILURE


def test_each_gpu_of_several_holds_its_part(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = make_plan(str(folder), gpu_bytes=24 * GIB).rows[0]
    command = [
        "doctor",
        "--model",
        str(folder),
        "--gpu-memory",
        "24GiB",
        "--home-dir",
        str(folder / "home"),
        "--json",
    ]
    assert main([*command, "--tensor-parallel-size", "4"]) == 0
    out, err = capsys.readouterr()
    plan = json.loads(out.splitlines()[-1])
    assert "on each of 4 GPUs of 24 GiB" in err
    assert {row["weights"] for row in plan["rows"]} == {"as stored"}
    each = plan["rows"][0]
    assert each["kv_bytes_per_token"] == one.kv_bytes_per_token // 4
    # Embedding and output head are whole on rank 0.
    whole = 2 * 2 * VALUES["vocab_size"] * VALUES["hidden_size"]
    assert each["weights_bytes"] - whole == pytest.approx((one.weights_bytes - whole) / 4, rel=0.01)
    assert main([*command, "--tensor-parallel-size", "3"]) == exit_codes.BAD_INPUT
    assert "num_attention_heads 32 is not a multiple" in capsys.readouterr().err


def test_quantizing_while_loading_needs_room_for_the_floats(folder: Path) -> None:
    plan = make_plan(str(folder), gpu_bytes=15 * GIB, context=2048)
    row = next(row for row in plan.rows if row.weights == "int4")
    assert row.num_sequences == 0
    assert "while loading" in row.problem


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("80GiB", 80 * GIB), ("80G", 80 * 10**9), ("1.5 gb", 15 * 10**8), ("123", 123)]
)
def test_sizes_are_read_with_their_units(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "much", "0GiB", "-1GB", "80XB", "i"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="80GiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--context", "50000"], "40960"),
        (["--dtype", "float32"], "bfloat16 or float16"),
        (["--context", "-1"], "-1"),
    ],
)
def test_a_plan_that_cannot_be_made_is_bad_input(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], named: str
) -> None:
    assert main(["doctor", "--model", str(folder), "--gpu-memory", "80GiB", *options]) == exit_codes.BAD_INPUT
    assert named in capsys.readouterr().err


def test_an_encoder_has_no_cache_to_plan(tmp_path: Path) -> None:
    config = {"model_type": "bert", "architectures": ["BertModel"], "vocab_size": 8, "hidden_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="is an encoder"):
        make_plan(str(tmp_path), gpu_bytes=GIB)
