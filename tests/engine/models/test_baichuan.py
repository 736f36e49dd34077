"""Baichuan 1 and 2 say what their description says: it is written here once more, in plain torch, for transformers has no class.

Source: the model cards and "Baichuan 2: Open Large-scale Language Models" (2023), section 2: Llama's block with q, k, v merged;
7B turns by position, 13B has ALiBi; Baichuan 2 brings the rows of its output head to length 1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.models.config import ModelConfig
from engine.models.layers import alibi_slopes
from tests.engine.models.parity import compare

LAYERS = 2
Weights = dict[str, Tensor]
SHAPES: dict[str, dict[str, Any]] = {
    "baichuan-7b": {"architectures": ["BaiChuanForCausalLM"], "max_position_embeddings": 256, "vocab_size": 97},
    "baichuan-13b": {
        "architectures": ["BaichuanForCausalLM"], "model_max_length": 256, "vocab_size": 97,
        "num_attention_heads": 6,  # no power of two, like the 40 of the published model
    },
    "baichuan2-7b": {
        "architectures": ["BaichuanForCausalLM"], "max_position_embeddings": 256, "vocab_size": 125_696, "hidden_size": 16,
    },
}  # fmt: skip


def write(name: str, folder: Path) -> tuple[dict[str, Any], Weights]:
    """A checkpoint of random weights: its config and tensors."""
    common = {
        "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False, "model_type": "baichuan",
    }  # fmt: skip
    config = {**common, **SHAPES[name]}
    vocab, hidden, inner = (config[key] for key in ("vocab_size", "hidden_size", "intermediate_size"))
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int, scale: float = 1.5) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale / shape[-1] ** 0.5

    def norm(low: float) -> Tensor:
        return low + torch.rand(hidden, generator=generator, dtype=torch.float64)

    weights = {
        "model.embed_tokens.weight": normal(vocab, hidden, scale=hidden**0.5),
        "lm_head.weight": normal(vocab, hidden, scale=4.0),
        # a logit of a head of unit rows has the spread of the norm's weight
        "model.norm.weight": norm(18.0 if vocab > 97 else 0.5),
    }
    for layer in range(LAYERS):
        start = f"model.layers.{layer}"
        weights |= {
            f"{start}.self_attn.W_pack.weight": normal(3 * hidden, hidden),
            f"{start}.self_attn.o_proj.weight": normal(hidden, hidden),
            f"{start}.mlp.gate_proj.weight": normal(inner, hidden),
            f"{start}.mlp.up_proj.weight": normal(inner, hidden),
            f"{start}.mlp.down_proj.weight": normal(hidden, inner),
            f"{start}.input_layernorm.weight": norm(0.5),
            f"{start}.post_attention_layernorm.weight": norm(0.5),
        }
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return config, weights


def slopes(heads: int) -> list[float]:
    """Each head's slope, by the recursion of the ALiBi paper's code."""
    if math.log2(heads).is_integer():
        start = 2 ** (-(2 ** -(math.log2(heads) - 3)))
        return [start ** (i + 1) for i in range(heads)]
    below = 2 ** math.floor(math.log2(heads))
    return slopes(below) + slopes(2 * below)[0::2][: heads - below]


def described(name: str, config: dict[str, Any], weights: Weights, tokens: Sequence[int]) -> Tensor:
    """Logits [n, V] as the description has them."""
    n, heads, hidden = len(tokens), config["num_attention_heads"], config["hidden_size"]
    size = hidden // heads
    positions = torch.arange(n)
    after = positions[None, :] > positions[:, None]
    bias = torch.zeros(heads, n, n, dtype=torch.float64)
    if name == "baichuan-13b":
        bias += torch.tensor(slopes(heads))[:, None, None] * (positions[None, :] - positions[:, None])

    def rms(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]) * weight

    def turned(x: Tensor) -> Tensor:
        if name == "baichuan-13b":
            return x
        angles = positions[:, None].float() * (1.0 / 10_000 ** (torch.arange(0, size, 2).float() / size))
        turn = torch.complex(
            angles.cos().double(), angles.sin().double()
        )  # float32 tables, as the models have
        pairs = torch.complex(x[..., : size // 2], x[..., size // 2 :]) * turn
        return torch.cat((pairs.real, pairs.imag), dim=-1)

    x = weights["model.embed_tokens.weight"][list(tokens)]
    for layer in range(LAYERS):
        own = {key.split(".", 3)[3]: value for key, value in weights.items() if f"layers.{layer}." in key}
        packed = rms(x, own["input_layernorm.weight"]) @ own["self_attn.W_pack.weight"].T
        q, k, v = (part.view(n, heads, size).transpose(0, 1) for part in packed.chunk(3, dim=-1))
        scores = turned(q) @ turned(k).transpose(1, 2) / size**0.5 + bias
        mixed = scores.masked_fill(after, -math.inf).softmax(-1) @ v
        x = x + mixed.transpose(0, 1).reshape(n, hidden) @ own["self_attn.o_proj.weight"].T
        inner = rms(x, own["post_attention_layernorm.weight"])
        gate, up = (inner @ own[f"mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        x = x + (gate * torch.sigmoid(gate) * up) @ own["mlp.down_proj.weight"].T
    head = weights["lm_head.weight"]
    if name.startswith("baichuan2"):
        head = head / head.norm(dim=-1, keepdim=True)
    return rms(x, weights["model.norm.weight"]) @ head.T


@pytest.mark.parametrize("name", SHAPES)
def test_an_engine_says_what_the_description_says(name: str, tmp_path: Path) -> None:
    config, weights = write(name, tmp_path)
    lengths = (12,) if config["vocab_size"] > 97 else (5, 70)
    found = compare(tmp_path, lambda tokens: described(name, config, weights, tokens), lengths=lengths)
    assert found.holds, found


def test_size_and_generation_are_told_from_the_config() -> None:
    published = {
        "hidden_size": 5120, "intermediate_size": 13_696, "num_hidden_layers": 40, "num_attention_heads": 40,
        "model_max_length": 4096, "rms_norm_eps": 1e-6, "architectures": ["BaichuanForCausalLM"],
    }  # fmt: skip
    first, second = (ModelConfig.from_dict({**published, "vocab_size": size}) for size in (64_000, 125_696))
    assert (first.has_alibi, first.has_normalized_head) == (True, False)
    assert (second.has_alibi, second.has_normalized_head) == (True, True)
    assert second.max_context == 4096
    assert second.num_parameters == 13_896_668_160
    seven = {
        **published,
        "vocab_size": 125_696,
        "max_position_embeddings": 4096,
        "num_attention_heads": 32,
        "hidden_size": 4096,
    }
    assert not ModelConfig.from_dict(seven).has_alibi


def test_heads_that_are_no_power_of_two_have_the_slopes_of_the_paper() -> None:
    for heads in (1, 2, 6, 8, 32, 40):
        torch.testing.assert_close(alibi_slopes(heads), torch.tensor(slopes(heads)), rtol=1e-6, atol=0)
