"""A tiny random model with a real tokenizer and chat template, made once per run, for tests that need true arithmetic.

Written file by file (no torch, no transformers): making it costs milliseconds.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from workbench.jobs import Jobs
from workbench.store import Store, open_store
from workbench.versions.demo.chat_format import BOS, CHAT_TEMPLATE, END, PAD, SPECIAL_TOKENS

sys.path.insert(0, str(Path(__file__).parent))  # postgres_server

if TYPE_CHECKING:
    from postgres_server import PostgresServer

VOCAB, HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, HEAD = 384, 64, 128, 2, 4, 2, 16


@pytest.fixture(scope="session")
def eventually() -> Callable[..., bool]:
    """Whether a condition comes true in time."""

    def wait(condition: Callable[[], bool], timeout_s: float = 20.0) -> bool:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if condition():
                return True
            time.sleep(0.02)
        return False

    return wait


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers and a vocabulary of 384, context 1024, tied embeddings, fp32."""
    from safetensors.numpy import save_file

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    folder.mkdir()
    save_file(_weights(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_config()))
    (folder / "tokenizer.json").write_text(_tokenizer_json())
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": END, "pad_token": PAD,
        "chat_template": CHAT_TEMPLATE, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return folder


@pytest.fixture(scope="session")
def other_models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models of the tiny one's shape with other random weights."""
    from safetensors.numpy import load_file, save_file

    weights = load_file(tiny_model / "model.safetensors")
    made = []
    for version in (2, 3):
        folder = tmp_path_factory.mktemp("versions") / f"v{version}"
        shutil.copytree(tiny_model, folder)
        generator = np.random.default_rng(version)
        changed = {
            name: w + generator.standard_normal(w.shape).astype(w.dtype) * 0.05 for name, w in weights.items()
        }
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        made.append(folder)
    return made


@pytest.fixture(scope="session")
def other_model(other_models: list[Path]) -> Path:
    return other_models[0]


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A PostgreSQL server for the whole run, about 2 s to start; the test is skipped where there is none."""
    from postgres_server import PostgresServer, why_missing

    if reason := why_missing():
        pytest.skip(reason)
    with PostgresServer() as server:
        yield server


@pytest.fixture
def postgres_url(postgres_server: PostgresServer, home: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty PostgreSQL database that this process, and those it starts, take for their store."""
    url = postgres_server.new_database()  # behind `home`, which clears the environment
    monkeypatch.setenv("QUIRE_DATABASE_URL", url)
    return url


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.full)])
def database(request: pytest.FixtureRequest) -> str:
    """Which database the store is in: a test that uses this runs with both."""
    if request.param == "postgresql":
        request.getfixturevalue("postgres_url")
    return str(request.param)


@pytest.fixture
def store(home: Path) -> Iterator[Store]:
    """The store of the HOME_DIR that the test's own `home` names."""
    with open_store(home) as opened:
        yield opened


@pytest.fixture
def jobs(store: Store, home: Path) -> Jobs:
    return Jobs(store, home)


@pytest.fixture(scope="session")
def adapter() -> Callable[..., Path]:
    """``adapter(folder, seed, rank=…, part=…, base_digest=…, **config)``: a LoRA folder of the tiny model in PEFT's files.

    A and B are large enough that no prompt is answered as the base or another seed answers it. `part`: only modules whose
    name holds it.
    """
    return _write_adapter


def _write_adapter(
    folder: Path, seed: int, *, rank: int = 4, part: str = "", base_digest: str = "", **config: object
) -> Path:
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(1000 + seed)
    weights, tensors = _weights(), {}
    targets = [name for name in weights if part in name and name.endswith("_proj.weight")]
    for name in targets:
        size_out, size_in = weights[name].shape
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{stem}.lora_A.weight"] = generator.standard_normal((rank, size_in)).astype(np.float32) * 0.1
        tensors[f"{stem}.lora_B.weight"] = (
            generator.standard_normal((size_out, rank)).astype(np.float32) * 0.1
        )
    metadata = {"format": "pt", "base_digest": base_digest}
    save_file(tensors, folder / "adapter_model.safetensors", metadata=metadata)
    values = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "tiny", "r": rank, "lora_alpha": 2 * rank,
        "target_modules": sorted({name.split(".")[-2] for name in targets}), "bias": "none", **config,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


def _config() -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "dtype": "float32",
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _weights() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (generator.standard_normal((rows, columns)) * 0.1).astype(np.float32)

    weights = {
        "model.embed_tokens.weight": matrix(VOCAB, HIDDEN),
        "model.norm.weight": np.ones(HIDDEN, np.float32),
    }
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        weights[f"{name}.self_attn.q_proj.weight"] = matrix(HEADS * HEAD, HIDDEN)
        weights[f"{name}.self_attn.k_proj.weight"] = matrix(KV_HEADS * HEAD, HIDDEN)
        weights[f"{name}.self_attn.v_proj.weight"] = matrix(KV_HEADS * HEAD, HIDDEN)
        weights[f"{name}.self_attn.o_proj.weight"] = matrix(HIDDEN, HEADS * HEAD)
        weights[f"{name}.mlp.gate_proj.weight"] = matrix(INTERMEDIATE, HIDDEN)
        weights[f"{name}.mlp.up_proj.weight"] = matrix(INTERMEDIATE, HIDDEN)
        weights[f"{name}.mlp.down_proj.weight"] = matrix(HIDDEN, INTERMEDIATE)
        weights[f"{name}.input_layernorm.weight"] = np.ones(HIDDEN, np.float32)
        weights[f"{name}.post_attention_layernorm.weight"] = np.ones(HIDDEN, np.float32)
    return weights


def _tokenizer_json() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_sentences(), trainer)
    text: str = backend.to_str()
    return text


def _sentences() -> Iterator[str]:
    words = ["the", "a", "cat", "dog", "house", "tree", "reads", "writes", "small", "large", "over", "under"]
    generator = random.Random(0)
    for _ in range(200):
        yield " ".join(generator.choices(words, k=12))
