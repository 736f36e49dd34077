"""EncoderConfig: the shape of an encoder of the BERT family, frozen, read once from config.json.

Boundary: files to values; no torch. Which models are computed here is one list of model types: their code in transformers takes
padding by an attention mask, and nothing else tells texts of a batch apart.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ConfigError, UnsupportedModelError
from engine.pooling import ENCODER_POOLINGS, SCORE, ModelPooling
from engine.pooling_files import read_pooling

MODEL_TYPES = (
    "albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "modernbert", "mpnet", "roberta",
    "xlm-roberta",
)  # fmt: skip
# Their positions begin behind the padding's id, and so do the rows of their position table.
_SHIFTED = ("camembert", "mpnet", "roberta", "xlm-roberta")
# Their code makes the attention scores of all pairs of tokens at once; that of the others leaves it to torch's fused attention.
_HOLD_SCORES = ("deberta", "deberta-v2", "mpnet")
_CLASSIFIER = "ForSequenceClassification"
_BODIES = ("Model", "ForMaskedLM", "ForPreTraining")  # checkpoints whose head, if any, is left out


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """What is known of an encoder before its weights are read."""

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    vocab_size: int
    max_context: int  # tokens of a text, with those that the tokenizer puts around it
    pad_token_id: int
    num_segments: int  # kinds of tokens: of the first and second text of a pair
    holds_scores: bool
    pooling: ModelPooling

    @property
    def is_classifier(self) -> bool:
        return self.architecture.endswith(_CLASSIFIER)


def is_encoder(folder: Path) -> bool:
    """Whether the folder's model is an encoder of this room; False also where there is no readable config.json."""
    values = _read(folder)
    names = tuple(map(str, values.get("architectures") or ()))
    return values.get("model_type") in MODEL_TYPES and not any(
        name.endswith(("ForCausalLM", "LMHeadModel")) for name in names
    )


def read_encoder_config(folder: Path) -> EncoderConfig:
    """The config of a folder for which `is_encoder` holds.

    Raises:
        UnsupportedModelError: a head, or a way to embed, that is not computed here.
        ConfigError: a size is missing.
    """
    values = _read(folder)
    kind = str(values["model_type"])
    architecture = next(iter(values.get("architectures") or ()), f"{kind} Model")
    if not architecture.endswith((_CLASSIFIER, *_BODIES)) or values.get("is_decoder"):
        raise UnsupportedModelError(
            f"{architecture} is not computed here", value=architecture, param="model",
            limit=tuple(f"*{ending}" for ending in (*_BODIES, _CLASSIFIER)),
            remedy="Encoders embed texts or, with a classification head, rate pairs of texts.",
        )  # fmt: skip
    pad = values.get("pad_token_id")
    pad = pad if isinstance(pad, int) else 0
    positions = _size(values, "max_position_embeddings") - (pad + 1 if kind in _SHIFTED else 0)
    pooling = _pooling_of(folder, values, architecture)
    return EncoderConfig(
        architecture=architecture,
        hidden_size=_size(values, "hidden_size", "dim"),
        num_layers=_size(values, "num_hidden_layers", "n_layers"),
        num_heads=_size(values, "num_attention_heads", "n_heads"),
        vocab_size=_size(values, "vocab_size"),
        max_context=min(positions, pooling.max_length or positions),
        pad_token_id=pad,
        num_segments=int(values.get("type_vocab_size") or 1),
        holds_scores=kind in _HOLD_SCORES,
        pooling=pooling,
    )


def _pooling_of(folder: Path, values: Mapping[str, Any], architecture: str) -> ModelPooling:
    size = _size(values, "hidden_size", "dim")
    if not architecture.endswith(_CLASSIFIER):
        return read_pooling(folder, ModelPooling("embed", "cls", poolings=ENCODER_POOLINGS, size=size))
    labels = values.get("id2label")
    num_labels = len(labels) if isinstance(labels, Mapping) else int(values.get("num_labels") or 2)
    task = SCORE if num_labels == 1 else "classify"
    return ModelPooling(
        task,
        SCORE,
        normalize=False,
        poolings=(SCORE,),
        num_labels=num_labels,
        has_sigmoid=_has_sigmoid(values),
    )


def _has_sigmoid(values: Mapping[str, Any]) -> bool:
    """What sentence-transformers' CrossEncoder does with the one logit, in either spelling of its config.

    Raises:
        UnsupportedModelError: another function.
    """
    own = values.get("sentence_transformers")
    asked = (own.get("activation_fn") if isinstance(own, Mapping) else None) or values.get(
        "sbert_ce_default_activation_function"
    )
    name = str(asked or "Sigmoid").rpartition(".")[2]
    if name not in ("Identity", "Sigmoid"):
        raise UnsupportedModelError(
            f"its scores go through {name}, which is not computed here", value=asked, limit=("Identity", "Sigmoid"),
            param="model", remedy="Use a cross-encoder with one of these.",
        )  # fmt: skip
    return name == "Sigmoid"


def _size(values: Mapping[str, Any], *names: str) -> int:
    for name in names:
        value = values.get(name)
        if isinstance(value, int) and value > 0:
            return value
    raise ConfigError(
        f"config.json has no {names[0]}", value=values.get(names[0]), limit="a number above 0", param=names[0],
        remedy="Download the model's config.json again.",
    )  # fmt: skip


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except ValueError:  # who reads it next says so
        values = {}
    return values if isinstance(values, dict) else {}
