"""Small configs of architectures that run through transformers' attention interface, each with what its kind is known for.

Windows lie well inside the contexts of `parity.check_parity`; scales and caps are far from 1, so that leaving one out shows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from transformers import PretrainedConfig

from tests.engine.models.native_configs import SHAPE

WINDOW = 20
GPT2: dict[str, Any] = {
    "vocab_size": 97, "n_embd": 48, "n_inner": 80, "n_layer": 2, "n_head": 4, "n_positions": 256, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": 3,
}  # fmt: skip
OPT: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 48, "ffn_dim": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 1,
}  # fmt: skip
FALCON = {
    key: value for key, value in SHAPE.items() if key not in ("intermediate_size", "num_key_value_heads")
}


def case(name: str, **changes: Any) -> Callable[[], PretrainedConfig]:
    """A config class of transformers by name, in the common shape but for the changes."""
    shape = {
        "GPT2Config": GPT2,
        "GPTBigCodeConfig": GPT2,
        "GPTJConfig": {**GPT2, "pad_token_id": None},
        "CTRLConfig": GPT2,
        "FalconConfig": FALCON,
        "OPTConfig": OPT,
    }.get(name, SHAPE)
    return lambda: getattr(transformers, name)(**{**shape, **changes})


THROUGH_TRANSFORMERS: dict[str, Callable[[], PretrainedConfig]] = {
    "apertus": case("ApertusConfig"),
    "arcee": case("ArceeConfig"),
    "biogpt": case("BioGptConfig"),
    "cohere": case("CohereConfig", logit_scale=0.25, use_qk_norm=True),
    "cohere2": case("Cohere2Config", sliding_window=WINDOW, num_hidden_layers=4),
    "ctrl": case("CTRLConfig", dff=80),
    "ernie4_5": case("Ernie4_5Config", head_dim=16),
    "exaone4": case("Exaone4Config", sliding_window=WINDOW, sliding_window_pattern=2),
    "falcon": case(
        "FalconConfig", alibi=False, multi_query=True, new_decoder_architecture=False, parallel_attn=True
    ),
    "falcon_grouped": case("FalconConfig", alibi=False, num_kv_heads=2, new_decoder_architecture=True),
    "gemma": case("GemmaConfig", head_dim=20),
    "gemma3n": case(
        "Gemma3nTextConfig",
        head_dim=12,
        sliding_window=WINDOW,
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        intermediate_size=[80] * 4,
        hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=97,
        laurel_rank=8,
        activation_sparsity_pattern=[0.0] * 4,
    ),
    "glm": case("GlmConfig", head_dim=12, attention_bias=True),
    "glm4": case("Glm4Config", head_dim=12, attention_bias=True),
    "gpt2": case("GPT2Config", scale_attn_by_inverse_layer_idx=True),
    "gpt_bigcode": case("GPTBigCodeConfig", multi_query=True),
    "gptj": case("GPTJConfig", rotary_dim=8),
    "granite": case(
        "GraniteConfig",
        embedding_multiplier=3.0,
        attention_multiplier=0.4,
        residual_multiplier=0.7,
        logits_scaling=2.0,
    ),
    "helium": case("HeliumConfig", head_dim=12),
    "nemotron": case("NemotronConfig", partial_rotary_factor=0.5),
    "olmo": case("OlmoConfig", clip_qkv=2.0),
    "olmo2": case("Olmo2Config"),
    "olmo3": case("Olmo3Config", sliding_window=WINDOW, num_hidden_layers=4),
    "opt": case("OPTConfig", word_embed_proj_dim=24, do_layer_norm_before=False),
    "persimmon": case("PersimmonConfig", partial_rotary_factor=0.5),
    "phi": case("PhiConfig", partial_rotary_factor=0.5, qk_layernorm=True),
    "seed_oss": case("SeedOssConfig", head_dim=12, attention_bias=True),
    "smollm3": case("SmolLM3Config", no_rope_layers=[1, 0]),
    "stablelm": case(
        "StableLmConfig", partial_rotary_factor=0.5, use_parallel_residual=True, qk_layernorm=True
    ),
    "starcoder2": case("Starcoder2Config", sliding_window=WINDOW),
    "vaultgemma": case("VaultGemmaConfig", head_dim=12, sliding_window=WINDOW, attn_logit_softcapping=3.0),
}
