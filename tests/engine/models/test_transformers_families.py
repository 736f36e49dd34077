"""Architectures without a native decoder say through their own code and our cache what transformers says without it."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.models.architecture_table import (
    LENGTHS,
    PAGE,
    architecture_of,
    features,
    merged,
    parity_through_transformers,
    read_table,
    write_table,
)
from tests.engine.models.native_configs import NATIVE
from tests.engine.models.parity import EXACT, InFloat64, compare, exact_logits, make_model
from tests.engine.models.transformers_configs import THROUGH_TRANSFORMERS

ALWAYS = {
    "cohere2",
    "falcon_grouped",
    "glm4",
    "gpt2",
    "granite",
    "opt",
    "stablelm",
    "starcoder2",
    "vaultgemma",
}
NOTICED = 1e4 * EXACT  # a changed config moves some log-probability by more than this
CASES = [
    pytest.param(name, marks=() if name in ALWAYS else pytest.mark.full) for name in THROUGH_TRANSFORMERS
]


@pytest.fixture(scope="module", autouse=True)
def lean() -> Iterator[None]:
    """One thread for models this small; and what transformers' modules hold is no garbage that each closing engine looks for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", CASES)
def test_an_engine_says_what_transformers_says_and_the_page_how_closely(name: str, tmp_path: Path) -> None:
    found = parity_through_transformers(THROUGH_TRANSFORMERS[name], tmp_path)
    assert found.holds, found
    assert found.error < float(read_table()[found.architecture][2])


@pytest.mark.parametrize(
    "names", [sorted(ALWAYS), pytest.param(list(THROUGH_TRANSFORMERS), marks=pytest.mark.full)]
)
def test_the_page_says_of_each_architecture_what_the_engine_says(names: list[str]) -> None:
    configs = [native.config() for native in NATIVE.values()] + [
        THROUGH_TRANSFORMERS[name]() for name in names
    ]
    table = read_table()
    for row in merged([(architecture_of(c), *_with_bound(c, "0")) for c in configs]).values():
        assert table[row[0]] == (*row[:2], table[row[0]][2], *row[3:]), (
            "run tests.engine.models.architecture_table"
        )


def test_the_page_has_a_row_for_each_case_and_no_other() -> None:
    cases = [native.config for native in NATIVE.values()] + list(THROUGH_TRANSFORMERS.values())
    assert set(read_table()) == {architecture_of(case()) for case in cases}


def test_writing_the_table_again_changes_nothing() -> None:
    before = PAGE.read_bytes()
    write_table(read_table())
    assert PAGE.read_bytes() == before


def _with_bound(config: Any, bound: str) -> tuple[str, ...]:
    path, *rest = features(config)
    return (path, bound, *rest)


FIELDS: list[tuple[str, dict[str, Any]]] = [
    ("cohere2", {"sliding_window": 21}),
    ("gpt2", {"activation_function": "relu"}),
    ("granite", {"logits_scaling": 2.1}),
    ("vaultgemma", {"attn_logit_softcapping": 5.0}),
]
MORE_FIELDS: list[tuple[str, dict[str, Any]]] = [
    ("cohere2", {"logit_scale": 0.07}),
    ("glm4", {"rms_norm_eps": 1e-2}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": False}),
    ("granite", {"attention_multiplier": 0.5}),
    ("opt", {"do_layer_norm_before": True, "_remove_final_layer_norm": True}),
    (
        "stablelm",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 900.0, "partial_rotary_factor": 0.5}},
    ),
    ("starcoder2", {"sliding_window": None}),
]


@pytest.mark.parametrize(
    ("name", "changes"), [*FIELDS, *(pytest.param(*more, marks=pytest.mark.full) for more in MORE_FIELDS)]
)
def test_no_field_of_a_config_is_ignored(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = make_model(THROUGH_TRANSFORMERS[name]())
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with InFloat64():
        found = compare(tmp_path, lambda tokens: exact_logits(model, tokens), lengths=LENGTHS[-1:])
    assert found.error > NOTICED
