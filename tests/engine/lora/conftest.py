"""A tiny random base, PEFT adapter folders for it, and models into which an adapter was merged."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.build import build_engine
from engine.config import EngineConfig
from engine.engine import Engine
from engine.sampling_params import SamplingParams

VOCAB = 61
SHAPE = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": VOCAB, "hidden_size": 32,
    "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "hidden_act": "silu",
}  # fmt: skip
SIZES = {  # outputs, inputs
    "self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32), "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (40, 32), "mlp.up_proj": (40, 32), "mlp.down_proj": (32, 40),
}  # fmt: skip
ALL = tuple(name.split(".")[1] for name in SIZES)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder in float64 whose choices are far from even."""
    folder, generator = tmp_path_factory.mktemp("base"), torch.Generator().manual_seed(7)
    tensors = {
        "model.embed_tokens.weight": random(generator, VOCAB, 32),
        "model.norm.weight": torch.ones(32).double(),
    }
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        for name, shape in SIZES.items():
            tensors[f"{prefix}.{name}.weight"] = random(generator, *shape) * shape[1] ** -0.5
        for name, size in (
            ("input_layernorm", 32), ("post_attention_layernorm", 32), ("self_attn.q_norm", 8), ("self_attn.k_norm", 8),
        ):  # fmt: skip
            tensors[f"{prefix}.{name}.weight"] = 1.0 + 0.2 * random(generator, size)
    (folder / "config.json").write_text(json.dumps(SHAPE))
    save_file(tensors, folder / "model.safetensors")
    return folder


def write_adapter(
    folder: Path,
    *,
    seed: int = 0,
    rank: int = 4,
    targets: tuple[str, ...] = ALL,
    layers: tuple[int, ...] = (0, 1),
    tensors: Callable[[dict[str, Tensor]], Any] = lambda tensors: None,
    **config: Any,
) -> Path:
    """A PEFT folder with random A and B; `tensors` may change what is written, `config` what the config says."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(1000 + seed)
    values: dict[str, Any] = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "base", "r": rank, "lora_alpha": 8,
        "target_modules": sorted(targets), "bias": "none", "use_dora": False, "use_rslora": False, "modules_to_save": None,
        "rank_pattern": {}, "alpha_pattern": {}, "init_lora_weights": True, **config,
    }  # fmt: skip
    made: dict[str, Tensor] = {}
    for layer in layers:
        for name, (size_out, size_in) in SIZES.items():
            if name.split(".")[1] in targets:
                module = f"model.layers.{layer}.{name}"
                r = next((n for p, n in values["rank_pattern"].items() if re.search(rf"{p}$", module)), rank)
                made[f"base_model.model.{module}.lora_A.weight"] = (
                    random(generator, r, size_in) * size_in**-0.5
                )
                made[f"base_model.model.{module}.lora_B.weight"] = random(generator, size_out, r) * r**-0.5
    tensors(made)
    (folder / "adapter_config.json").write_text(json.dumps(values))
    save_file(made, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="session")
def adapter() -> Callable[..., Path]:
    """``adapter(folder, seed=…, rank=…, targets=…, layers=…, tensors=…, **config)``."""
    return write_adapter


@pytest.fixture(scope="session")
def merge() -> Callable[..., Path]:
    """``merge(base, adapter, target, {module: scale})``: W + scale · B A in a model folder of its own."""

    def merge(base: Path, adapter: Path, target: Path, scales: Callable[[str], float]) -> Path:
        target.mkdir()
        weights, parts = (
            load_file(base / "model.safetensors"),
            load_file(adapter / "adapter_model.safetensors"),
        )
        for name in parts:
            if name.endswith("lora_A.weight"):
                module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                delta = parts[name.replace("lora_A", "lora_B")] @ parts[name]
                weights[f"{module}.weight"] = weights[f"{module}.weight"] + scales(module) * delta
        (target / "config.json").write_text((base / "config.json").read_text())
        save_file(weights, target / "model.safetensors")
        return target

    return merge


@pytest.fixture
def build(base: Path) -> Iterator[Callable[..., Engine]]:
    """``build(**settings)``: an engine of the base that takes adapters; closed at the end of the test."""
    made: list[Engine] = []

    def build(**settings: Any) -> Engine:
        values: dict[str, Any] = {
            "model": str(base), "dtype": "float64", "device": "cpu", "num_blocks": 128, "block_size": 4, "max_num_seqs": 16,
            "max_model_len": 64, "num_threads": 1, "enable_lora": True, "max_lora_rank": 8, **settings,
        }  # fmt: skip
        made.append(build_engine(EngineConfig(**values)))
        return made[-1]

    yield build
    for engine in made:
        engine.close()


@dataclass
class Ran:
    """What requests got: tokens, log-probabilities, errors, and which adapters shared a step."""

    tokens: dict[str, list[int]] = field(default_factory=dict)
    logprobs: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    batches: list[set[str]] = field(default_factory=list)  # request ids by step


@pytest.fixture(scope="session")
def run() -> Callable[..., Ran]:
    """``run(engine, {name: (prompt, adapter)}, arrive={name: step}, at={step: action})``: 12 tokens each, most likely ones."""

    def run(
        engine: Engine,
        requests: Mapping[str, tuple[list[int], str | None]],
        *,
        max_tokens: int = 12,
        arrive: Mapping[str, int] | None = None,
        at: Mapping[int, Callable[[], Any]] | None = None,
    ) -> Ran:
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, logprobs=0)
        ran, waiting, step = Ran(), dict(requests), 0
        while waiting or engine.has_work:
            if at and step in at:
                at[step]()
            for name in [n for n in waiting if (arrive or {}).get(n, 0) <= step]:
                prompt, lora = waiting.pop(name)
                engine.add(engine.make_request(prompt, params, request_id=name, lora=lora))
            output, step = engine.step(), step + 1
            engine.check_integrity()
            for delta in output.deltas:
                if delta.error is not None:
                    ran.errors[delta.request_id] = delta.error
                ran.tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
                ran.logprobs.setdefault(delta.request_id, []).extend(e.logprob for e in delta.logprobs)
            if output.record is not None:
                ran.batches.append({name for name, _ in output.record.rows})
            assert step < 2000, "the engine makes no progress"
        return ran

    return run
