"""Tiny random checkpoints of every native family, made with transformers, and ways to run them.

Weights are scaled until the next-token distribution has an entropy under 2 nats: flat logits would hide errors.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from engine.attention.interface import AttentionBackend, AttentionMetadata
from engine.attention.reference import ReferenceAttention
from engine.build import build_engine
from engine.config import EngineConfig
from engine.memory import make_kv_spec
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.models.weights import load_weights
from engine.plan import TokenLogprobs
from engine.records import StepRecord
from engine.runner.model_runner import allocate_caches
from engine.sampling_params import SamplingParams

VOCAB = 97
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
# Large enough that BLAS and vectorised functions do pick other paths for other numbers of rows.
WIDE = {
    "hidden_size": 192,
    "intermediate_size": 500,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 48,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 8.0,
    "beta_slow": 1.0,
}
# Windows (20) and rotary thresholds (48, 64) lie well inside the contexts of the tests (up to 130 tokens).
FAMILIES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama2_mha_untied": (LlamaConfig, {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "llama3_gqa_tied": (
        LlamaConfig,
        {"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE},
    ),
    "llama_linear_mqa": (
        LlamaConfig,
        {
            "num_key_value_heads": 1,
            "head_dim": 22,
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
        },
    ),
    "llama_yarn_biased": (
        LlamaConfig,
        {"num_key_value_heads": 2, "rope_parameters": YARN_ROPE, "attention_bias": True, "mlp_bias": True},
    ),
    "wide_llama": (LlamaConfig, WIDE),
    "mistral_window": (MistralConfig, {"num_key_value_heads": 2, "sliding_window": 20, "head_dim": 12}),
    "qwen2_bias_window": (
        Qwen2Config,
        {
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "sliding_window": 20,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2_full": (Qwen2Config, {"num_key_value_heads": 2, "tie_word_embeddings": False}),
    "qwen3_norm_window": (
        Qwen3Config,
        {
            "num_key_value_heads": 1,
            "head_dim": 20,
            "use_sliding_window": True,
            "sliding_window": 20,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "tie_word_embeddings": True,
        },
    ),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from threads, and threads cost much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class TinyModel:
    """One checkpoint and the transformers model that wrote it, in float64."""

    name: str
    folder: Path
    reference: PreTrainedModel

    @property
    def config_values(self) -> dict[str, Any]:
        values: dict[str, Any] = json.loads((self.folder / "config.json").read_text())
        return values

    def greedy_choices(self, prompt: Sequence[int], continuation: Sequence[int]) -> list[int]:
        """transformers' most likely token at each place of the continuation, given what stands before it.

        It equals the continuation if and only if that is transformers' own greedy continuation; it takes one pass.
        """
        logits = self.logits([*prompt, *continuation])
        choices: list[int] = logits[len(prompt) - 1 : -1].argmax(-1).tolist()
        return choices

    def generate(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """transformers' greedy continuation, generated token by token."""
        tokens = torch.tensor([list(prompt)])
        generated = self.reference.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        continuation: list[int] = generated[0, len(prompt) :].tolist()
        return continuation

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """transformers' logits [n, V]."""
        with torch.no_grad():
            logits: Tensor = self.reference(torch.tensor([list(tokens)])).logits[0]
        return logits

    def copy(self, folder: Path, **changes: Any) -> Path:
        """The checkpoint in another folder, with changed keys in its config.json (None removes a key)."""
        shutil.copytree(self.folder, folder)
        values = {**self.config_values, **changes}
        values = {key: value for key, value in values.items() if value is not None or key not in changes}
        (folder / "config.json").write_text(json.dumps(values))
        return folder


def make_tiny(name: str, folder: Path) -> TinyModel:
    """Write a checkpoint of a family to the folder."""
    kind, changes = FAMILIES[name]
    config = kind(**{**COMMON, **changes})
    config._attn_implementation = "eager"
    torch.manual_seed(sum(name.encode()))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif parameter.ndim == 1:
                parameter.normal_(0.0, 0.3)
            elif "embed_tokens" in parameter_name or "lm_head" in parameter_name:
                parameter.normal_(0.0, 1.0)
            else:
                parameter.normal_(0.0, 1.5 / parameter.shape[1] ** 0.5)
    model.save_pretrained(folder)
    return TinyModel(name, folder, model)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyModel]:
    """Checkpoints by family name, each written once per session."""
    made: dict[str, TinyModel] = {}

    def get(name: str) -> TinyModel:
        if name not in made:
            made[name] = make_tiny(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture(params=sorted(set(FAMILIES) - {"wide_llama"}), scope="session")
def tiny_model(request: pytest.FixtureRequest, tiny_models: Callable[[str], TinyModel]) -> TinyModel:
    """Each family in turn."""
    return tiny_models(request.param)


def random_prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(0, VOCAB, (length,), generator=generator).tolist()


@pytest.fixture(scope="session")
def prompt_of() -> Callable[..., list[int]]:
    """``prompt_of(length, seed)``: random token ids."""
    return random_prompt


def decoder_logits(folder: Path, values: dict[str, Any], tokens: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Logits [n, V] of our decoder for one row, its weights from the folder, its shape from config values."""
    model = ModelConfig.from_dict(values)
    device, block_size, length = torch.device("cpu"), 8, len(tokens)
    decoder = Decoder(model, dtype=dtype, device=device, max_positions=length)
    load_weights(decoder, folder)
    num_blocks = -(-length // block_size)
    caches = allocate_caches(make_kv_spec(model, block_size, dtype), num_blocks, dtype, device)
    meta = AttentionMetadata(
        query_start=torch.tensor([0, length], dtype=torch.int32),
        seq_lens=torch.tensor([length], dtype=torch.int32),
        block_tables=torch.arange(num_blocks, dtype=torch.int32)[None].flip(1).contiguous(),
        slot_mapping=(num_blocks - 1 - torch.arange(length) // block_size) * block_size
        + torch.arange(length) % block_size,
        max_query_len=length,
        max_seq_len=length,
        num_decode_rows=0,
    )
    attention: AttentionBackend = ReferenceAttention()
    with torch.inference_mode():
        hidden = decoder(torch.tensor(tokens), torch.arange(length), caches, meta, attention)
        return decoder.logits(hidden)


@pytest.fixture(scope="session")
def our_logits() -> Callable[..., Tensor]:
    """``our_logits(folder, config_values, tokens, dtype)``."""
    return decoder_logits


@pytest.fixture(scope="session")
def config_values() -> Callable[[Path], dict[str, Any]]:
    """``config_values(folder)``: what its config.json says."""

    def read(folder: Path) -> dict[str, Any]:
        values: dict[str, Any] = json.loads((folder / "config.json").read_text())
        return values

    return read


@dataclass
class Run:
    """What an engine did: tokens and log-probabilities by request, and its step records."""

    tokens: dict[str, list[int]] = field(default_factory=dict)
    logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)
    prompt_logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)
    cached: dict[str, int] = field(default_factory=dict)
    records: list[StepRecord] = field(default_factory=list)

    @property
    def preempted(self) -> set[str]:
        return {request_id for record in self.records for request_id in record.preempted}

    @property
    def prefix_hits(self) -> dict[str, int]:
        return {name: n for record in self.records for name, n in record.prefix_hits if n}

    @property
    def mixed_steps(self) -> int:
        """Steps in which some requests prefill and others decode."""
        return sum(1 for r in self.records if r.num_prefill_tokens and r.num_decode_tokens)

    def steps_of(self, request_id: str) -> list[int]:
        """Tokens that the request computed, step by step."""
        return [n for record in self.records for name, n in record.rows if name == request_id]


def run_requests(
    folder: Path,
    prompts: dict[str, Sequence[int]],
    params: SamplingParams | dict[str, SamplingParams],
    *,
    arrive_at: dict[str, int] | None = None,
    **settings: Any,
) -> Run:
    """Run the prompts on a new engine; request r is added before step ``arrive_at[r]`` (0 when not named)."""
    defaults: dict[str, Any] = {
        "dtype": "float64",
        "num_blocks": 256,
        "block_size": 4,
        "max_num_seqs": 16,
        "num_threads": 1,
    }
    engine = build_engine(EngineConfig(model=str(folder), **{**defaults, **settings}))
    run, waiting, step = Run(), dict(prompts), 0
    arrive_at = arrive_at or {}
    try:
        while waiting or engine.has_work:
            for name in [n for n in waiting if arrive_at.get(n, 0) <= step]:
                chosen = params[name] if isinstance(params, dict) else params
                engine.add(engine.make_request(tuple(waiting.pop(name)), chosen, request_id=name))
            output = engine.step()
            step += 1
            if output.record is not None:
                assert output.record.error is None, output.record.error
                run.records.append(output.record)
            for delta in output.deltas:
                assert delta.error is None, delta.error
                run.tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
                run.logprobs.setdefault(delta.request_id, []).extend(delta.logprobs)
                if delta.prompt_logprobs:
                    run.prompt_logprobs[delta.request_id] = list(delta.prompt_logprobs)
            assert step < 5000, "the engine makes no progress"
        engine.check_integrity()
    finally:
        engine.close()
    return run


@pytest.fixture(scope="session")
def run_engine() -> Callable[..., Run]:
    """``run_engine(folder, {name: prompt}, params, arrive_at=…, **engine settings)``."""
    return run_requests
