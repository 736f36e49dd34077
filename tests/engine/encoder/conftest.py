"""Tiny random encoders, written with transformers in the test, each with a tokenizer of its family's form."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PretrainedConfig, PreTrainedModel

WORDS = [f"w{i}" for i in range(80)]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
SIZES: dict[str, Any] = {
    "vocab_size": len(SPECIAL) + len(WORDS), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
DISTIL = {
    "vocab_size": SIZES["vocab_size"],
    "dim": 32,
    "hidden_dim": 48,
    "n_layers": 2,
    "n_heads": 4,
    "pad_token_id": 0,
}
DEBERTA = {
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "position_buckets": 8,
    "type_vocab_size": 0,
}
# family -> class name before "Config" and "Model", and its config
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "albert": ("Albert", {**SIZES, "embedding_size": 16}),
    "bert": ("Bert", SIZES),
    "deberta": ("DebertaV2", {**SIZES, **DEBERTA}),
    "distilbert": ("DistilBert", {**DISTIL, "max_position_embeddings": 64}),
    "electra": ("Electra", {**SIZES, "embedding_size": 16}),
    "modernbert": ("ModernBert", {**SIZES, "local_attention": 8, "global_attn_every_n_layers": 2}),
    "mpnet": ("MPNet", SIZES),
    "roberta": ("Roberta", {**SIZES, "type_vocab_size": 1}),
    "xlm-roberta": ("XLMRoberta", {**SIZES, "type_vocab_size": 1}),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_encoder(family: str, folder: Path, kind: str = "Model", **changes: Any) -> PreTrainedModel:
    """Write a checkpoint in float64 with its tokenizer; `kind`: how its class is called, such as "ForMaskedLM"."""
    name, sizes = ENCODERS[family]
    config: PretrainedConfig = getattr(transformers, f"{name}Config")(**sizes, **changes)
    torch.manual_seed(sum(family.encode()))
    model: PreTrainedModel = getattr(transformers, name + kind)(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # far from what they are made as: no part may vanish
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.4)
    model.save_pretrained(folder)
    write_tokenizer(folder, pair_types=family in ("albert", "bert", "electra", "deberta"))
    return model


def write_tokenizer(folder: Path, *, pair_types: bool) -> None:
    """Words as tokens, <s> and </s> around a text and between a pair."""
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *WORDS])}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    second = 1 if pair_types else 0
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair=f"<s> $A </s> $B:{second} </s>:{second}",
        special_tokens=[("<s>", 1), ("</s>", 2)],
    )
    backend.save(str(folder / "tokenizer.json"))
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))


@pytest.fixture(scope="session")
def encoder() -> Callable[..., PreTrainedModel]:
    """``encoder(family, folder, kind="Model", **config changes)``: a checkpoint; transformers' model of it."""
    return make_encoder


@pytest.fixture(scope="session")
def words() -> Callable[..., str]:
    """``words(count, seed=0)``: a text of so many tokens without what stands around it."""

    def make(count: int, seed: int = 0) -> str:
        generator = torch.Generator().manual_seed(100 * seed + count)
        return " ".join(WORDS[int(i)] for i in torch.randint(0, len(WORDS), (count,), generator=generator))

    return make
