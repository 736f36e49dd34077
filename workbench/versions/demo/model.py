"""The demo model's architecture and the loss on answers. Plain transformers Llama, nothing of its own."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from workbench.versions.demo.batches import MicroBatch
from workbench.versions.demo.chat_format import BOS, END, PAD, SPECIAL_TOKENS

MAX_LENGTH = 2048


def demo_config(vocab_size: int = 4096, *, hidden_size: int = 256, num_layers: int = 8) -> LlamaConfig:
    """About 7 million parameters at the default sizes."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 11 // 4,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=max(1, hidden_size // 128),
        head_dim=64,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=SPECIAL_TOKENS.index(BOS),
        eos_token_id=SPECIAL_TOKENS.index(END),
        pad_token_id=SPECIAL_TOKENS.index(PAD),
    )


def new_model(config: LlamaConfig, seed: int) -> LlamaForCausalLM:
    """Random weights from a seed, SDPA attention."""
    torch.manual_seed(seed)
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM(config)


def compute_dtype(device: torch.device) -> torch.dtype:
    """bf16 where its matrix product is fast: on a GPU, and on CPUs with AVX512-BF16 or AMX; else fp32.

    Source: without those instructions bf16 autocast trained at 0.4 × the speed of fp32 (2 cores, November 2026).
    """
    if device.type == "cuda":
        return torch.bfloat16
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.is_file() else ""
    return torch.bfloat16 if "avx512_bf16" in flags or "amx_bf16" in flags else torch.float32


def hardware(device: torch.device) -> str:
    """The GPU, or the CPU and its number of cores, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def answer_loss(model: LlamaForCausalLM, batch: MicroBatch) -> torch.Tensor:
    """Sum of the cross-entropy over answer tokens, in nats. Logits are computed at answer positions only."""
    ids = batch.ids.to(model.device)
    is_answer = batch.is_answer.to(model.device)
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    picked = hidden[is_answer[:, 1:]]
    logits = model.lm_head(picked).float()
    return functional.cross_entropy(logits, ids[:, 1:][is_answer[:, 1:]], reduction="sum")
