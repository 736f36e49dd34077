"""Merging equals running the adapter beside the base, in another implementation too; wrong and broken adapters are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from engine import LLM, SamplingParams
from workbench.versions.adapter import CONFIG_NAME, WEIGHTS_NAME, read_adapter
from workbench.versions.digest import folder_digest
from workbench.versions.errors import AdapterError, WriteError, WrongBaseError
from workbench.versions.lora import inject
from workbench.versions.merge import MARKER, is_merged, merge, merged_digest

IDS = torch.tensor([[1, 40, 77, 300, 12, 9, 250, 31]])


@torch.inference_mode()
def logits(model: LlamaForCausalLM) -> torch.Tensor:
    result: torch.Tensor = model.eval()(input_ids=IDS).logits
    return result


@pytest.fixture
def adapter(make_adapter: Callable[[int], Path]) -> Path:
    return make_adapter(0)


def test_merged_logits_are_those_of_base_and_adapter(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    base = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    plain = logits(base)
    found = read_adapter(adapter)
    layers = inject(base, rank=found.rank, alpha=found.alpha, targets=found.targets, seed=1)
    tensors = load_file(adapter / WEIGHTS_NAME)
    with torch.no_grad():
        for name, layer in layers.items():
            layer.lora_A.copy_(tensors[f"base_model.model.{name}.lora_A.weight"])
            layer.lora_B.copy_(tensors[f"base_model.model.{name}.lora_B.weight"])
    beside = logits(base)
    folder = merge(tiny_model, adapter, tmp_path / "merged")
    merged = logits(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32))
    torch.testing.assert_close(merged, beside, rtol=1e-4, atol=1e-4)
    assert (merged - plain).abs().max() > 100 * (merged - beside).abs().max(), "the adapter must do something"


def test_our_engine_serves_the_merged_folder(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    folder = merge(tiny_model, adapter, tmp_path / "merged")
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = logits(model)[0, -1].argmax().item()
    with LLM(
        str(folder), dtype="float32", device="cpu", num_blocks=8, max_num_seqs=2, max_model_len=64
    ) as llm:
        given = llm.generate([IDS[0].tolist()], SamplingParams(max_tokens=1, temperature=0.0))
    assert list(given[0].token_ids) == [expected]


def test_merging_twice_gives_the_same_bytes(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    first, second = (merge(tiny_model, adapter, tmp_path / name) for name in ("a", "b"))
    assert folder_digest(first) == folder_digest(second) != folder_digest(tiny_model)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_what_is_there_is_kept_and_what_is_damaged_made_again(
    tiny_model: Path, adapter: Path, tmp_path: Path
) -> None:
    folder = merge(tiny_model, adapter, tmp_path / "merged")
    digest, made_at = folder_digest(folder), (folder / MARKER).stat().st_mtime_ns
    merge(tiny_model, adapter, tmp_path / "merged")
    assert (folder / MARKER).stat().st_mtime_ns == made_at
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    assert not is_merged(folder)
    merge(tiny_model, adapter, tmp_path / "merged")
    assert folder_digest(folder) == digest


def test_adapter_of_another_base_is_refused_with_both_digests(
    tiny_model: Path, adapter: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-6}))
    with pytest.raises(WrongBaseError) as caught:
        merge(other, adapter, tmp_path / "merged")
    assert folder_digest(other) in str(caught.value)
    assert folder_digest(tiny_model) in str(caught.value)
    assert not (tmp_path / "merged").exists()
    assert merged_digest("a", "b") != merged_digest("b", "a")


def test_adapter_of_another_shape_is_refused(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    """One that says nothing of its base, as other tools write them."""
    broken = tmp_path / "adapter"
    shutil.copytree(adapter, broken)
    tensors = {name: torch.zeros(3, 5) for name in load_file(adapter / WEIGHTS_NAME)}
    save_file(tensors, broken / WEIGHTS_NAME)
    with pytest.raises(AdapterError, match="update is"):
        merge(tiny_model, broken, tmp_path / "merged")
    save_file({"base_model.model.other.lora_A.weight": torch.zeros(3, 5)}, broken / WEIGHTS_NAME)
    with pytest.raises(AdapterError, match="no layer"):
        merge(tiny_model, broken, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_quantized_base_is_refused(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    """Its int8 numbers have the names and shapes of weights: an update would be added to them and rounded away."""
    nameless, base = tmp_path / "adapter", tmp_path / "base"
    shutil.copytree(adapter, nameless)
    save_file(load_file(adapter / WEIGHTS_NAME), nameless / WEIGHTS_NAME)
    shutil.copytree(tiny_model, base)
    tensors = load_file(base / "model.safetensors")
    as_stored = {name: t.to(torch.int8) if "_proj" in name else t for name, t in tensors.items()}
    save_file(as_stored, base / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors"}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=r"compressed-tensors.*unquantized base"):
        merge(base, nameless, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("change", [{"use_dora": True}, {"bias": "all"}, {"peft_type": "IA3"}, {"r": None}])
def test_kinds_of_adapters_that_are_not_known_are_refused(
    adapter: Path, tmp_path: Path, change: dict[str, object]
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    config = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps({**config, **change}))
    with pytest.raises(AdapterError):
        read_adapter(folder)


def test_truncated_adapter_is_refused(adapter: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    weights = folder / WEIGHTS_NAME
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(AdapterError, match="whole safetensors"):
        read_adapter(folder)
    weights.unlink()
    with pytest.raises(AdapterError, match=WEIGHTS_NAME):
        read_adapter(folder)


def test_a_full_disk_is_named_and_leaves_nothing(
    tiny_model: Path,
    adapter: Path,
    tmp_path: Path,
    small_files: Callable[[int], AbstractContextManager[None]],
) -> None:
    with small_files(50_000), pytest.raises(WriteError) as caught:
        merge(tiny_model, adapter, tmp_path / "merged")
    assert str(tmp_path / "merged") in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert is_merged(merge(tiny_model, adapter, tmp_path / "merged"))
