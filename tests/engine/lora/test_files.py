"""Adapter folders: what is loaded computes what merged weights compute; all else is refused before anything changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.engine import Engine
from engine.errors import (
    CorruptWeightsError,
    EngineError,
    InvalidRequestError,
    ModelNotFoundError,
    UnsupportedAdapterError,
)
from workbench.versions.adapter import adapter_digest

Build = Callable[..., Engine]
Adapter = Callable[..., Path]
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B0 = A0.replace("lora_A", "lora_B")
PATTERNS = {"rank_pattern": {"layers.1.mlp.up_proj": 7, "q_proj": 2}, "alpha_pattern": {"v_proj": 3}}


def patterned(module: str) -> float:
    rank = 7 if module.endswith("layers.1.mlp.up_proj") else 2 if module.endswith("q_proj") else 4
    return (3 if module.endswith("v_proj") else 8) / rank


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"rank": 8}, lambda module: 1.0),
        ({"rank": 1, "targets": ("q_proj", "down_proj")}, lambda module: 8.0),
        ({"rank": 3, "targets": ("v_proj", "up_proj"), "layers": (1,)}, lambda module: 8 / 3),
        ({"rank": 4, "use_rslora": True}, lambda module: 4.0),
        (PATTERNS, patterned),
    ],
    ids=["full-rank", "rank-1", "some-modules", "rslora", "patterns"],
)
def test_an_adapter_computes_what_its_merged_weights_compute(
    settings: dict[str, Any], scale: Callable[[str], float], base: Path, build: Build, adapter: Adapter, merge: Any,
    run: Any, tmp_path: Path,
) -> None:  # fmt: skip
    folder = adapter(tmp_path / "adapter", seed=3, **settings)
    engine = build()
    lora = engine.add_lora("one", folder)
    assert lora.digest == adapter_digest(folder), "one name for one content, here and in the workbench"
    got = run(engine, {"with": (PROMPT, "one"), "without": (PROMPT, None)})
    merged = build(model=str(merge(base, folder, tmp_path / "merged", scale)), enable_lora=False)
    want = run(merged, {"with": (PROMPT, None)})
    assert got.tokens["with"] == want.tokens["with"] != got.tokens["without"]
    # Both sums are of float64 and differ by their order, over two layers.
    assert got.logprobs["with"] == pytest.approx(want.logprobs["with"], abs=1e-9)


def drop(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda tensors: tensors.pop(name)


def put(name: str, value: torch.Tensor) -> Callable[[dict[str, Any]], Any]:
    return lambda tensors: tensors.__setitem__(name, value)


ONES = torch.ones
REFUSED: dict[str, tuple[dict[str, Any], type[EngineError], str]] = {
    "dora": ({"use_dora": True}, UnsupportedAdapterError, "use_dora"),
    "other peft": ({"peft_type": "IA3"}, UnsupportedAdapterError, "peft_type"),
    "bias": ({"bias": "lora_only"}, UnsupportedAdapterError, "bias"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, UnsupportedAdapterError, "modules_to_save"),
    "changed base": ({"init_lora_weights": "pissa"}, UnsupportedAdapterError, "init_lora_weights"),
    "rank": ({"rank": 9}, UnsupportedAdapterError, "max_lora_rank 8"),
    "embedding": (
        {"tensors": put("base_model.model.model.embed_tokens.lora_embedding_A", ONES(4, 61))},
        UnsupportedAdapterError, "embed_tokens",
    ),
    "head": (
        {"tensors": lambda t: [put(f"base_model.model.lm_head.lora_{s}.weight", ONES(*n))(t) for s, n in
                               (("A", (4, 32)), ("B", (61, 4)))]},
        UnsupportedAdapterError, "lm_head",
    ),
    "magnitude": ({"tensors": put(A0.replace("lora_A.weight", "lora_magnitude_vector"), ONES(32))},
                  UnsupportedAdapterError, "magnitude"),
    "deeper base": (
        {"tensors": lambda t: [t.__setitem__(n.replace("layers.1", "layers.2"), v.clone()) for n, v in list(t.items())]},
        UnsupportedAdapterError, r"layers\.2",
    ),
    "other family": (
        {"tensors": lambda t: [t.__setitem__(n.replace("self_attn", "attn"), t.pop(n)) for n in list(t)]},
        UnsupportedAdapterError, "attn",
    ),
    "wider base": ({"tensors": put(A0, ONES(4, 48))}, UnsupportedAdapterError, "32 inputs"),
    "higher B": ({"tensors": put(B0, ONES(48, 4))}, UnsupportedAdapterError, "32 outputs"),
    "integers": ({"tensors": put(A0, ONES(4, 32, dtype=torch.int8))}, UnsupportedAdapterError, "int8"),
    "half": ({"tensors": drop(B0)}, CorruptWeightsError, "both A and B"),
    "nothing": ({"tensors": lambda t: t.clear()}, CorruptWeightsError, "any module"),
    "not finite": ({"tensors": put(A0, torch.full((4, 32), float("nan")))}, CorruptWeightsError, "finite"),
    "other rank": ({"r": 5}, CorruptWeightsError, "says rank 5"),
    "no alpha": ({"lora_alpha": None}, CorruptWeightsError, "lora_alpha"),
    "no pattern": ({"alpha_pattern": [1]}, CorruptWeightsError, "alpha_pattern"),
    "no expression": ({"alpha_pattern": {"(": 1}}, CorruptWeightsError, "regular expression"),
}  # fmt: skip


def test_what_cannot_be_loaded_is_refused_and_disturbs_nobody(
    build: Build, adapter: Adapter, run: Any, tmp_path: Path
) -> None:
    """All refusals happen between the steps of a request with an adapter; it gets what it gets alone."""
    engine = build()
    good = adapter(tmp_path / "good")
    engine.add_lora("good", good)
    alone = run(engine, {"alone": (PROMPT, "good")}, max_tokens=30)
    loaded = engine.loras
    seen: list[str] = []

    def refuse(name: str, make: Callable[[Path], Path], kind: type[EngineError], text: str) -> None:
        with pytest.raises(kind, match=text) as caught:
            engine.add_lora("bad", make(tmp_path / name))
        assert caught.value.param in ("lora", "max_lora_rank"), name
        assert caught.value.remedy, name
        seen.append(name)

    def truncated(folder: Path) -> Path:
        file = adapter(folder) / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        return folder

    def pickled(folder: Path) -> Path:
        adapter(folder)
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
        return folder

    def no_json(folder: Path) -> Path:
        (adapter(folder) / "adapter_config.json").write_text("[1")
        return folder

    cases: list[Callable[[], None]] = [
        lambda name=name, case=case: refuse(name, lambda folder: adapter(folder, **case[0]), case[1], case[2])
        for name, case in REFUSED.items()
    ]
    cases += [
        lambda: refuse("truncated", truncated, CorruptWeightsError, "safetensors"),
        lambda: refuse("pickled", pickled, ModelNotFoundError, "adapter_model.safetensors"),
        lambda: refuse("nowhere", lambda folder: folder, ModelNotFoundError, "adapter_config.json"),
        lambda: refuse("no json", no_json, CorruptWeightsError, "adapter_config.json"),
        lambda: refuse_name("good"),
        lambda: refuse_name(""),
    ]

    def refuse_name(name: str) -> None:
        with pytest.raises(InvalidRequestError):
            engine.add_lora(name, good)
        seen.append(f"name {name}")

    again = run(engine, {"again": (PROMPT, "good")}, max_tokens=30, at=dict(enumerate(cases)))
    assert len(seen) == len(REFUSED) + 6
    assert engine.loras == loaded
    assert (again.tokens["again"], again.errors) == (alone.tokens["alone"], {})


def test_an_engine_without_adapters_says_so(build: Build, adapter: Adapter, tmp_path: Path) -> None:
    engine = build(enable_lora=False)
    with pytest.raises(InvalidRequestError, match="enable_lora=True"):
        engine.add_lora("one", adapter(tmp_path / "one"))
    with pytest.raises(InvalidRequestError, match="enable_lora=True"):
        engine.remove_lora("one")
    assert engine.loras == ()
