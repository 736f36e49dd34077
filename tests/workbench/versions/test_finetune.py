"""LoRA fine-tuning learns, resumes to the same weights, writes what PEFT reads, and refuses what cannot train."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from workbench.versions.adapter import CONFIG_NAME, WEIGHTS_NAME, read_adapter, read_lineage
from workbench.versions.digest import folder_digest
from workbench.versions.errors import (
    CheckpointMismatchError,
    FinetuneConfigError,
    TrainingDataError,
    WriteError,
)
from workbench.versions.finetune import ADAPTER, CHECKPOINT, LoraConfig, Progress, finetune
from workbench.versions.tickets.generator import TicketData
from workbench.versions.training_data import JsonlData, data_facts, data_from, encode_all


def test_it_learns_and_changes_nothing_but_the_adapter(config: LoraConfig, tmp_path: Path) -> None:
    before = folder_digest(config.base)
    losses: list[float] = []
    finetune(replace(config, out=tmp_path, steps=40), lambda p: losses.append(p.loss))
    assert len(losses) == 40
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    assert folder_digest(config.base) == before


def test_stopped_and_continued_ends_with_the_same_adapter(config: LoraConfig, tmp_path: Path) -> None:
    straight = finetune(replace(config, out=tmp_path / "straight"))
    assert straight is not None
    parted = replace(config, out=tmp_path / "parted")
    for stop_at in (2, 5):
        assert finetune(parted, lambda p, at=stop_at: p.step < at) is None
        assert (parted.out / CHECKPOINT).is_file()
        assert not (parted.out / ADAPTER).exists()
    seen: list[int] = []
    continued = finetune(parted, lambda p: seen.append(p.step))
    assert continued is not None
    assert seen == [6], "it must go on, not begin again"
    assert read_adapter(continued).digest == read_adapter(straight).digest
    assert read_lineage(continued)["training"]["losses"] == read_lineage(straight)["training"]["losses"]
    assert not (parted.out / CHECKPOINT).exists()


def test_done_is_done(config: LoraConfig, tmp_path: Path) -> None:
    config = replace(config, out=tmp_path)
    first = finetune(config)

    def never(progress: Progress) -> None:
        raise AssertionError("trained again")

    assert finetune(config, never) == first
    with pytest.raises(CheckpointMismatchError, match="another recipe"):
        finetune(replace(config, peak_lr=1e-3))


def test_checkpoint_of_another_recipe_is_refused(config: LoraConfig, tmp_path: Path) -> None:
    config = replace(config, out=tmp_path)
    assert finetune(config, lambda p: False) is None
    with pytest.raises(CheckpointMismatchError, match="another recipe"):
        finetune(replace(config, seed=9))


_ENDLESS = """
import sys, json
from dataclasses import replace
from pathlib import Path
import torch
torch.set_num_threads(1)
from workbench.versions.finetune import LoraConfig, finetune
from workbench.versions.training_data import JsonlData
base, out, data = map(Path, sys.argv[1:4])
config = LoraConfig(base=base, out=out, data=JsonlData(data), rank=4, steps=100000, batch_tokens=64, device="cpu", checkpoint_every_s=0.0)
finetune(config, lambda p: print(p.step, flush=True))
"""


@pytest.mark.full
def test_killed_while_saving_leaves_a_checkpoint_to_go_on_from(
    config: LoraConfig, data: JsonlData, tmp_path: Path
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _ENDLESS, str(config.base), str(tmp_path), str(data.path)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    assert process.stdout is not None
    steps = [int(process.stdout.readline()) for _ in range(5)]
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert state["progress"]["step"] >= steps[-1] - 1
    assert not (tmp_path / ADAPTER).exists()


def test_files_are_what_peft_reads(config: LoraConfig, tmp_path: Path) -> None:
    folder = finetune(replace(config, out=tmp_path, targets=("q_proj", "down_proj")))
    assert folder is not None
    tensors = load_file(folder / WEIGHTS_NAME)
    stem = "base_model.model.model.layers.1.mlp.down_proj"
    assert tensors[f"{stem}.lora_A.weight"].shape == (4, 128)
    assert tensors[f"{stem}.lora_B.weight"].shape == (64, 4)
    assert len(tensors) == 2 * 2 * 2
    written = json.loads((folder / CONFIG_NAME).read_text())
    assert (written["peft_type"], written["r"], written["lora_alpha"]) == ("LORA", 4, 8.0)
    assert written["target_modules"] == ["down_proj", "q_proj"]
    found = read_adapter(folder)
    assert found.base_digest == folder_digest(config.base)
    assert found.targets == ("down_proj", "q_proj")
    assert folder.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"steps": 0}, "steps"),
        ({"rank": -1}, "rank"),
        ({"dtype": "int8"}, "dtype"),
        ({"targets": ("w1",)}, "targets"),
        ({"base": Path("/nowhere")}, "base"),
        ({"max_length": 3}, "max_length"),
    ],
)
def test_bad_values_are_refused_by_name(
    config: LoraConfig, tmp_path: Path, change: dict[str, object], param: str
) -> None:
    with pytest.raises(FinetuneConfigError) as caught:
        finetune(replace(config, out=tmp_path / "run", **change))  # type: ignore[arg-type]
    assert caught.value.param == param
    assert not (tmp_path / "run" / ADAPTER).exists()


@pytest.mark.parametrize(
    "text",
    ["", "no json\n", '{"messages": []}\n', '{"messages": [{"role": "user", "content": "a"}]}\n', "[1]\n"],
)
def test_bad_training_files_are_refused(config: LoraConfig, tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(TrainingDataError) as caught:
        finetune(replace(config, out=tmp_path / "run", data=JsonlData(path)))
    assert "bad.jsonl" in str(caught.value)


def test_data_is_told_and_read_back(data: JsonlData) -> None:
    for given in (TicketData(7, 3, {"cancel": 0.5}), data):
        assert data_from(data_facts(given)) == given
    for bad in ({"kind": "csv"}, {"num_examples": 0}, {"nope": 1}, {"kind": "jsonl"}):
        with pytest.raises(TrainingDataError):
            data_from(bad)


@pytest.mark.full
def test_encoding_in_processes_is_the_same(tiny_model: Path) -> None:
    tokenizer = tiny_model / "tokenizer.json"
    assert encode_all(TicketData(30), tokenizer, 1) == encode_all(TicketData(30), tokenizer)


def test_a_full_disk_is_named_and_the_run_goes_on_later(
    config: LoraConfig, tmp_path: Path, small_files: Callable[[int], AbstractContextManager[None]]
) -> None:
    config = replace(config, out=tmp_path)
    assert finetune(config, lambda p: p.step < 3) is None
    with small_files(10_000), pytest.raises(WriteError):
        finetune(config)
    assert not (tmp_path / ADAPTER).exists()
    seen: list[int] = []
    assert finetune(config, lambda p: seen.append(p.step)) == tmp_path / ADAPTER
    assert seen == [4, 5, 6]
