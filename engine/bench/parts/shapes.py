"""Published model shapes that engines with random weights are made in: speed does not depend on the weights' values.

Source: the config.json of Qwen/Qwen3-8B, meta-llama/Llama-3.1-8B and Qwen/Qwen3-0.6B, keys that decide a shape only (Llama's
rope scaling is left out: it changes values, no time). `TINY` is of no model: every benchmark runs through in it anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.models.config import ModelConfig


@dataclass(frozen=True)
class Shape:
    """A model without weights."""

    name: str
    values: dict[str, Any]  # as in config.json

    @property
    def model(self) -> ModelConfig:
        return ModelConfig.from_dict(self.values)


QWEN3_8B = Shape("Qwen3-8B", {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096,
    "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "hidden_act": "silu", "rope_theta": 1000000.0,
})  # fmt: skip
QWEN3_600M = Shape("Qwen3-0.6B", {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024,
    "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
    "head_dim": 128, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    "hidden_act": "silu", "rope_theta": 1000000.0,
})  # fmt: skip
LLAMA_8B = Shape("Llama-3.1-8B", {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "hidden_act": "silu", "rope_theta": 500000.0,
})  # fmt: skip
TINY = Shape("tiny", {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 512, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "hidden_act": "silu", "rope_theta": 10000.0,
})  # fmt: skip
