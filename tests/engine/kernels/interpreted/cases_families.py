"""Decoders of the families that add parts to the Llama block: with kernels they compute what torch's operations do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from engine.attention.interface import AttentionMetadata
from engine.attention.reference import ReferenceAttention
from engine.memory import make_kv_spec
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.runner.model_runner import allocate_caches

CPU = torch.device("cpu")
TOKENS, BLOCK = 6, 8
SHAPE: dict[str, Any] = {
    "vocab_size": 31, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"], "sliding_window": 3, "final_logit_softcapping": 20.0,
        "attn_logit_softcapping": 10.0, "layer_types": ["sliding_attention", "full_attention"],
    },
    "mixtral": {"architectures": ["MixtralForCausalLM"], "num_local_experts": 3},
    "qwen2-moe": {
        "architectures": ["Qwen2MoeForCausalLM"], "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
    },
    "baichuan-13b": {"architectures": ["BaichuanForCausalLM"], "model_max_length": 64, "max_position_embeddings": None},
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_kernels_change_nothing_but_roundings(name: str) -> None:
    values = {key: value for key, value in {**SHAPE, **FAMILIES[name]}.items() if value is not None}
    config = ModelConfig.from_dict(values)
    assert not config.unfused("cuda")
    torch.manual_seed(0)
    decoder = Decoder(config, dtype=torch.float32, device=CPU, max_positions=TOKENS)
    for parameter in decoder.parameters():
        parameter.normal_(0.0, 0.2)
    want = logits(decoder)
    decoder.use_kernels()
    torch.testing.assert_close(logits(decoder), want, rtol=1e-4, atol=1e-5)


def logits(decoder: Decoder) -> Tensor:
    meta = AttentionMetadata(
        query_start=torch.tensor([0, TOKENS], dtype=torch.int32),
        seq_lens=torch.tensor([TOKENS], dtype=torch.int32),
        block_tables=torch.zeros(1, 1, dtype=torch.int32),
        slot_mapping=torch.arange(TOKENS),
        max_query_len=TOKENS,
        max_seq_len=TOKENS,
        num_decode_rows=0,
    )
    caches = allocate_caches(make_kv_spec(decoder.config, BLOCK, torch.float32), 1, torch.float32, CPU)
    with torch.inference_mode():
        tokens = torch.arange(TOKENS) * 5
        hidden = decoder(tokens, torch.arange(TOKENS), caches, meta, ReferenceAttention())
        return decoder.logits(hidden)
