"""Every native architecture says what transformers says, in float64 to the rounding of its sums, and no field of its config is
ignored.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm, Gemma2TextScaledWordEmbedding

from engine.build import build_engine
from engine.config import EngineConfig
from engine.errors import EngineError, UnsupportedModelError
from engine.memory import workspace_bytes
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.models.layers import RMSNorm
from engine.models.weights import load_weights
from tests.engine.models.native_configs import NATIVE
from tests.engine.models.parity import (
    EXACT,
    check_parity,
    compare,
    exact_logits,
    make_model,
    random_tokens,
)

NOTICED = 1e4 * EXACT  # a changed config moves some log-probability by more than this
FLOAT32 = 2e-3  # largest difference of a log-probability in float32, sharp as they are


# The first four are compared in `test_parity.py` too.
KNOWN = ("llama", "mistral", "qwen2", "qwen3")


def long(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.full)


@pytest.mark.parametrize("name", [long(name) if name in KNOWN else name for name in NATIVE])
def test_an_engine_says_what_transformers_says(name: str, tmp_path: Path) -> None:
    case = NATIVE[name]
    check_parity(case.config(), tmp_path, lengths=case.lengths, **case.settings)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint of each config, written once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            make_model(NATIVE[name].config()).save_pretrained(made[name])
        return made[name]

    return get


# What has a part of its own on the compiled path of a CPU: the fused step, and torch's operations around compiled attention.
@pytest.mark.parametrize(
    ("name", "is_fused"), [("phi3", True), ("gemma3", False), long("mixtral", False), long("gpt-neox", False)]
)
def test_the_best_path_of_this_machine_says_it_in_float32(name: str, is_fused: bool, tmp_path: Path) -> None:
    case = NATIVE[name]
    model = make_model(case.config())
    model.save_pretrained(tmp_path)
    assert bool(ModelConfig.from_folder(tmp_path).unfused("cpu")) != is_fused
    found = compare(tmp_path, lambda tokens: exact_logits(model, tokens), lengths=(5, 60), dtype="float32")
    assert found.error < FLOAT32, found


# Merged projections that a checkpoint merges too have one adapter; a layer with experts takes one for its attention.
ADAPTED = [
    long("phi3", ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), "float64", EXACT),
    ("phi3", ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), "float32", FLOAT32),
    ("mixtral", ("q_proj", "k_proj", "v_proj", "o_proj"), "float64", EXACT),
    ("gpt-neox", ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"), "float64", EXACT),
]


@pytest.mark.parametrize(("name", "targets", "dtype", "margin"), ADAPTED)
def test_an_adapter_is_what_it_adds_to_the_weights(
    name: str, targets: tuple[str, ...], dtype: str, margin: float, tmp_path: Path
) -> None:
    model = make_model(NATIVE[name].config())
    model.save_pretrained(tmp_path / "base")
    add_adapter(model, targets, tmp_path / "adapter")
    found = compare(
        tmp_path / "base", lambda tokens: exact_logits(model, tokens), lengths=(40,), adapter=tmp_path / "adapter",
        dtype=dtype, enable_lora=True, max_lora_rank=8,
    )  # fmt: skip
    assert found.error < margin, found


def add_adapter(model: PreTrainedModel, targets: tuple[str, ...], folder: Path) -> None:
    """Write a PEFT folder with random A and B for the target modules of each layer, and add what they make to the model."""
    tensors: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in targets:
            a, b = (
                torch.randn(*shape).double() * 0.2
                for shape in ((4, module.in_features), (module.out_features, 4))
            )
            tensors |= {
                f"base_model.model.{name}.lora_A.weight": a,
                f"base_model.model.{name}.lora_B.weight": b,
            }
            module.weight.data += 2.0 * b @ a
    assert len(tensors) == 2 * 2 * len(targets)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": list(targets)}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def full(**changes: Any) -> dict[str, Any]:
    """Changes of the rotary embedding of Gemma 3's layers without a window."""
    return {"rope_parameters": {"full_attention": changes}}


def local(**changes: Any) -> dict[str, Any]:
    return {"rope_parameters": {"sliding_attention": changes}}


def rope(**changes: Any) -> dict[str, Any]:
    return {"rope_parameters": changes}


PERTURBED: list[tuple[str, dict[str, Any]]] = [
    ("phi3", rope(rope_theta=9000.0)),
    ("phi3", {"sliding_window": 21}),
    ("phi3", {"sliding_window": None}),
    ("phi3", {"rms_norm_eps": 1e-2}),
    ("phi3-longrope-beyond", rope(long_factor=[1.0, 1.5, 2.0, 3.0, 4.0, 6.5])),
    ("phi3-longrope-beyond", rope(rope_theta=9000.0)),
    ("phi3-longrope-beyond", rope(attention_factor=1.0)),
    ("phi3-longrope-beyond", {"max_position_embeddings": 512}),
    ("phi3-longrope-beyond", {"original_max_position_embeddings": 32}),
    ("phi3-longrope-beyond", rope(partial_rotary_factor=0.5, long_factor=[1.0] * 4, short_factor=[1.0] * 4)),
    ("phi3-longrope-within", rope(short_factor=[1.0, 1.05, 1.1, 1.2, 1.3, 1.7])),
    ("phi3-longrope-within", {"original_max_position_embeddings": 32}),
    ("gemma2", {"attn_logit_softcapping": 5.0}),
    ("gemma2", {"attn_logit_softcapping": None}),
    ("gemma2", {"final_logit_softcapping": 26.0}),
    ("gemma2", {"final_logit_softcapping": None}),
    ("gemma2", {"query_pre_attn_scalar": 16}),
    ("gemma2", {"sliding_window": 21}),
    ("gemma2", {"layer_types": ["full_attention", "sliding_attention"]}),
    ("gemma2", {"rms_norm_eps": 1e-2}),
    ("gemma2", rope(rope_theta=9000.0)),
    ("gemma3", full(factor=2.0)),
    ("gemma3", full(rope_type="default")),
    ("gemma3", full(rope_theta=9000.0)),
    ("gemma3", local(rope_theta=9000.0)),
    ("gemma3", {"sliding_window": 21}),
    ("gemma3", {"layer_types": ["full_attention", "sliding_attention"]}),
    ("gemma3", {"query_pre_attn_scalar": 16}),
    ("gemma3", {"attn_logit_softcapping": 50.0}),
    ("gemma3", {"final_logit_softcapping": 30.0}),
    ("mixtral", {"num_experts_per_tok": 1}),
    ("mixtral", {"num_experts_per_tok": 3}),
    ("mixtral", {"sliding_window": 21}),
    ("mixtral", rope(rope_theta=9000.0)),
    ("qwen3-moe", {"norm_topk_prob": False}),
    ("qwen3-moe", {"num_experts_per_tok": 2}),
    ("qwen3-moe-mixed", {"sliding_window": 21}),
    ("qwen3-moe-mixed", {"use_sliding_window": False}),
    ("qwen2-moe", {"norm_topk_prob": True}),
    ("qwen2-moe", {"num_experts_per_tok": 2}),
    ("qwen2-moe", {"layer_types": ["full_attention", "sliding_attention"]}),
    ("qwen2-moe", {"sliding_window": 21}),
    ("gpt-neox", {"use_parallel_residual": False}),
    ("gpt-neox", {"hidden_act": "gelu_new"}),
    ("gpt-neox", {"layer_norm_eps": 1e-2}),
    ("gpt-neox", rope(rope_theta=9000.0)),
    ("gpt-neox", rope(partial_rotary_factor=0.34)),
]


def changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Config values with changes, those of the rotary embedding merged in."""
    merged = {**values, **changes}
    if "rope_parameters" in changes:
        old, new = values["rope_parameters"], changes["rope_parameters"]
        nested = {k: {**old[k], **v} if isinstance(v, dict) else v for k, v in new.items()}
        merged["rope_parameters"] = {**old, **nested}
    return merged


@pytest.mark.parametrize(("name", "changes"), PERTURBED)
def test_no_field_of_a_config_is_ignored(
    name: str,
    changes: dict[str, Any],
    folder_of: Callable[[str], Path],
    our_logits: Callable[..., Tensor],
    config_values: Callable[[Path], dict[str, Any]],
) -> None:
    folder = folder_of(name)
    values, tokens = config_values(folder), random_tokens(50 if name.endswith("within") else 80, 97)
    as_it_is, other = (
        our_logits(folder, each, tokens, torch.float64).log_softmax(-1)
        for each in (values, changed(values, changes))
    )
    assert (other - as_it_is).abs().max() > NOTICED


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("phi3", {"num_key_value_heads": 4}),
        ("phi3-longrope-beyond", rope(long_factor=[1.0] * 5)),
        ("phi3-longrope-beyond", rope(short_factor=None)),
        ("gemma2", {"hidden_activation": "relu"}),
        ("gemma2", {"tie_word_embeddings": False}),
        ("gemma2", {"architectures": ["Gemma3ForCausalLM"]}),
        ("gemma2", {"layer_types": ["sliding_attention", "chunked_attention"]}),
        ("gemma3", {"use_bidirectional_attention": True}),
        ("qwen2", {"is_causal": False}),
        ("gemma3", {"architectures": ["Gemma2ForCausalLM"]}),
        ("mixtral", {"num_local_experts": 4}),
        ("mixtral", {"num_local_experts": 6}),
        ("mixtral", {"num_experts_per_tok": 6}),
        ("qwen3-moe", {"moe_intermediate_size": 16}),
        ("qwen3-moe", {"mlp_only_layers": [1]}),
        ("qwen3-moe", {"decoder_sparse_step": 2}),
        ("qwen2-moe", {"shared_expert_intermediate_size": 16}),
        ("qwen2-moe", {"qkv_bias": False}),
        ("gpt-neox", {"attention_bias": False}),
        ("gpt-neox", rope(partial_rotary_factor=0.25)),  # 3 values make no pairs
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    name: str,
    changes: dict[str, Any],
    folder_of: Callable[[str], Path],
    our_logits: Callable[..., Tensor],
    config_values: Callable[[Path], dict[str, Any]],
) -> None:
    folder = folder_of(name)
    with pytest.raises(EngineError):
        our_logits(folder, changed(config_values(folder), changes), [1, 2, 3], torch.float64)


def test_older_spellings_are_the_same_model(
    folder_of: Callable[[str], Path], config_values: Callable[[Path], dict[str, Any]]
) -> None:
    def without(values: dict[str, Any], *keys: str) -> dict[str, Any]:
        return {key: value for key, value in values.items() if key not in keys}

    phi3 = config_values(folder_of("phi3-longrope-beyond"))
    scaling = {**phi3["rope_parameters"], "type": "su"}
    older = without(phi3, "rope_parameters") | {
        "rope_theta": scaling.pop("rope_theta"), "partial_rotary_factor": scaling.pop("partial_rotary_factor"),
        "rope_scaling": without(scaling, "rope_type", "original_max_position_embeddings"),
    }  # fmt: skip
    assert ModelConfig.from_dict(older) == ModelConfig.from_dict(phi3)

    gemma3 = config_values(folder_of("gemma3"))
    older = without(gemma3, "rope_parameters", "layer_types") | {
        "rope_theta": 50_000.0, "rope_local_base_freq": 5000.0, "sliding_window_pattern": 2,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    }  # fmt: skip
    assert ModelConfig.from_dict(older) == ModelConfig.from_dict(gemma3)
    assert ModelConfig.from_dict(gemma3).max_context == gemma3["max_position_embeddings"]

    neox = config_values(folder_of("gpt-neox"))
    older = without(neox, "rope_parameters", "attention_bias") | {"rotary_pct": 0.5, "rotary_emb_base": 10000}
    assert ModelConfig.from_dict(older) == ModelConfig.from_dict(neox)

    moe = config_values(folder_of("qwen3-moe"))
    older = without(moe, "num_local_experts") | {"num_experts": moe["num_local_experts"]}
    assert ModelConfig.from_dict(older) == ModelConfig.from_dict(moe)


@pytest.mark.parametrize(
    "name", ["phi3", "gemma2", "gemma3", "mixtral", "qwen2-moe", "qwen3-moe-mixed", "gpt-neox"]
)
def test_sizes_are_those_of_the_decoder(name: str, folder_of: Callable[[str], Path]) -> None:
    model = ModelConfig.from_folder(folder_of(name))
    decoder = Decoder(model, dtype=torch.float32, device=torch.device("cpu"), max_positions=8)
    assert model.num_parameters == sum(parameter.numel() for parameter in decoder.parameters())
    weights = decoder.step_weights()
    unread = 0 if model.tie_embeddings else 4 * model.vocab_size * model.hidden_size
    assert weights.layers + weights.head == 4 * model.num_step_parameters
    assert 4 * model.num_parameters - unread >= weights.layers + weights.head


def test_scores_that_the_reference_computes_on_a_cpu_have_their_room(
    folder_of: Callable[[str], Path],
) -> None:
    capped = ModelConfig.from_folder(folder_of("gemma2"))
    config = EngineConfig(
        model="-",
        attention_backend="cpu",
        max_batched_tokens=64,
        max_model_len=256,
        max_num_seqs=4,
        dtype="float32",
    )
    with_cap, without = (
        workspace_bytes(config, model, torch.float32, torch.device("cpu"))
        for model in (capped, replace(capped, attention_softcap=None))
    )
    assert with_cap - without >= 4 * capped.num_heads * 64 * 256  # float32 scores of the longest chunk


def test_gemma_rounds_where_its_own_code_does() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 48, dtype=torch.bfloat16)
    theirs = Gemma2RMSNorm(48).bfloat16()
    torch.nn.init.normal_(theirs.weight)
    ours = RMSNorm(48, theirs.eps, dtype=torch.bfloat16, device=torch.device("cpu"), offset=True)
    ours.weight.copy_(theirs.weight.detach())
    assert torch.equal(ours(x), theirs(x))

    model = ModelConfig.from_dict(
        NATIVE["gemma2"].config().to_dict() | {"architectures": ["Gemma2ForCausalLM"]}
    )
    decoder = Decoder(model, dtype=torch.bfloat16, device=torch.device("cpu"), max_positions=8)
    scale = Gemma2TextScaledWordEmbedding(1, 1, 0, embed_scale=48**0.5).embed_scale
    assert decoder.embedding_scale is not None
    assert torch.equal(decoder.embedding_scale, scale.bfloat16())


@pytest.mark.parametrize("name", ["mixtral", long("gemma2"), long("gpt-neox")])
def test_deterministic_mode_holds_on_a_cpu(name: str, tmp_path: Path) -> None:
    values = NATIVE[name].config()
    # Large enough that BLAS picks other paths for other numbers of rows.
    values.hidden_size, values.intermediate_size, values.num_attention_heads = 192, 500, 6
    make_model(values).save_pretrained(tmp_path)
    config = EngineConfig(
        model=str(tmp_path),
        dtype="float32",
        deterministic=True,
        num_blocks=64,
        block_size=8,
        num_threads=1,
    )
    engine = build_engine(config)
    try:
        assert engine.stats().is_proven_deterministic
    finally:
        engine.close()


def test_tensors_of_other_modalities_alone_are_left_out(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = folder_of("gemma3-multimodal")
    tensors = load_file(folder / "model.safetensors")
    assert any(name.startswith("vision_tower.") for name in tensors)
    decoder = Decoder(
        ModelConfig.from_folder(folder), dtype=torch.float64, device=torch.device("cpu"), max_positions=8
    )
    load_weights(decoder, folder)
    save_file({**tensors, "audio_tower.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"audio_tower\.weight"):
        load_weights(decoder, tmp_path)


def test_experts_are_not_quantized(folder_of: Callable[[str], Path]) -> None:
    with pytest.raises(EngineError, match="5 experts"):
        build_engine(EngineConfig(model=str(folder_of("mixtral")), quantization="int8"))
