"""The shipped model loads offline with transformers, passes its prompt chips, and its card says what was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from workbench.versions.demo.generator import FAMILIES
from workbench.versions.demo.model_card import write_card
from workbench.versions.demo.tasks import Check

MODEL = Path(__file__).parents[3] / "data" / "models" / "chat-base"
CHIPS: list[dict[str, Any]] = json.loads((MODEL / "prompt_chips.json").read_text(encoding="utf-8"))["chips"]
FIGURES: dict[str, Any] = json.loads((MODEL / "figures.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, local_files_only=True, dtype=torch.float32).eval()


def test_there_are_chips_of_several_families() -> None:
    assert 6 <= len(CHIPS) <= 11
    assert len({chip["family"] for chip in CHIPS}) >= 5


@pytest.mark.parametrize("chip", CHIPS, ids=[f"{i}-{chip['family']}" for i, chip in enumerate(CHIPS)])
def test_model_passes_its_chip(model: Any, tokenizer: Any, chip: dict[str, Any]) -> None:
    ids = tokenizer.apply_chat_template(
        chip["messages"],
        tools=chip["tools"] or None,
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=False,
    )
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=480, do_sample=False)
    answer = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=False)
    assert answer.endswith("<|end|>")
    assert Check.from_json(chip["check"]).passes(answer.removesuffix("<|end|>")), answer


def test_chips_do_not_pass_without_an_answer() -> None:
    for chip in CHIPS:
        check = Check.from_json(chip["check"])
        assert check.passes(chip["expected"])
        assert not check.passes("")


def test_weights_are_bf16_and_as_many_as_the_card_says(model: Any) -> None:
    with safe_open(MODEL / "model.safetensors", framework="pt") as file:
        dtypes = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert dtypes == {torch.bfloat16}
    assert sum(p.numel() for p in model.parameters()) == FIGURES["parameters"]


def test_card_is_written_from_the_figures() -> None:
    card = (MODEL / "README.md").read_text(encoding="utf-8")
    assert card == write_card(FIGURES, len(CHIPS))
    for family, score in FIGURES["evaluation"]["scores"].items():
        assert re.search(rf"\| {family} \|.*\| {score['passed']}/{score['total']},.*\|", card)
    assert set(FIGURES["evaluation"]["scores"]) == {*FAMILIES, "story"}


def test_every_family_was_judged_on_enough_tasks() -> None:
    totals = {family: score["total"] for family, score in FIGURES["evaluation"]["scores"].items()}
    story = totals.pop("story")
    known = [score["total"] for score in FIGURES["evaluation"]["scores_new_values"].values()]
    assert min(totals.values()) >= 200
    assert min(known) >= 100
    assert story >= 50
