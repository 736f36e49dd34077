"""Small configs of every architecture that the native decoder runs and transformers has a class for.

Windows and rotary thresholds lie well inside the contexts of `parity.check_parity` (82 tokens).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import (
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SiglipVisionConfig,
)


@dataclass(frozen=True, slots=True)
class Native:
    """A config, and where it is compared: prompt lengths, and settings of the engine."""

    config: Callable[[], PretrainedConfig]
    lengths: tuple[int, ...] = (5, 70)
    settings: Mapping[str, Any] = field(default_factory=dict)


SHAPE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": None,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 5000.0,
    "short_factor": [1.0, 1.05, 1.1, 1.2, 1.3, 1.6],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0],
    "original_max_position_embeddings": 64,
    "partial_rotary_factor": 0.75,  # 12 of 16 values
}


def phi3() -> PretrainedConfig:
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1}
    return Phi3Config(**{**SHAPE, **heads}, original_max_position_embeddings=64, rope_parameters={**LONGROPE})


EXPERTS = {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
NEOX = {key: value for key, value in SHAPE.items() if key != "num_key_value_heads"} | {"rotary_pct": 0.5}
# Caps low enough to bend scores and logits, a query scale that is not the head size's.
GEMMA = {
    **SHAPE, "head_dim": 16, "sliding_window": 20, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 4.0,
    "final_logit_softcapping": 25.0,
}  # fmt: skip
GEMMA3_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 50_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
}


def gemma3() -> Gemma3TextConfig:
    kinds = ["sliding_attention", "full_attention"]
    uncapped = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    return Gemma3TextConfig(**{**GEMMA, **uncapped}, layer_types=kinds, rope_parameters={**GEMMA3_ROPES})


def gemma3_multimodal() -> PretrainedConfig:
    vision = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    return Gemma3Config(text_config=gemma3(), vision_config=vision, mm_tokens_per_image=4)


NATIVE: dict[str, Native] = {
    "llama": Native(lambda: LlamaConfig(**SHAPE)),
    "mistral": Native(lambda: MistralConfig(**SHAPE, sliding_window=20)),
    "qwen2": Native(lambda: Qwen2Config(**SHAPE)),
    "qwen3": Native(lambda: Qwen3Config(**SHAPE, head_dim=20)),
    "phi3": Native(lambda: Phi3Config(**SHAPE, sliding_window=20)),
    "mixtral": Native(
        lambda: MixtralConfig(**SHAPE, num_local_experts=5, num_experts_per_tok=2, sliding_window=20)
    ),
    "qwen3-moe": Native(lambda: Qwen3MoeConfig(**SHAPE, **EXPERTS, head_dim=12, norm_topk_prob=True)),
    "qwen3-moe-mixed": Native(
        lambda: Qwen3MoeConfig(
            **SHAPE, **EXPERTS, head_dim=12, mlp_only_layers=[0], use_sliding_window=True, sliding_window=20
        )
    ),
    "qwen2-moe": Native(
        lambda: Qwen2MoeConfig(
            **SHAPE, **EXPERTS, shared_expert_intermediate_size=32, use_sliding_window=True, sliding_window=20
        )
    ),
    "gpt-neox": Native(lambda: GPTNeoXConfig(**NEOX)),
    "gpt-neox-sequential": Native(
        lambda: GPTNeoXConfig(**NEOX, use_parallel_residual=False, attention_bias=False)
    ),
    "gemma2": Native(lambda: Gemma2Config(**GEMMA)),
    "gemma3": Native(gemma3),
    "gemma3-multimodal": Native(gemma3_multimodal, lengths=(60,)),
    # An engine turns by the factors of its longest context: every text of the one is beyond the threshold, of the other none.
    "phi3-longrope-beyond": Native(phi3, lengths=(66, 70)),
    "phi3-longrope-within": Native(phi3, lengths=(5, 37), settings={"max_model_len": 64}),
}
