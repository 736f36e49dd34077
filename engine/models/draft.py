"""The draft model of a config: found, and held against the model that it guesses for.

Boundary: configs and tokenizers; no weights are read here. What it takes is ``engine.memory``'s, what it does
``engine.runner.draft``'s.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.errors import ConfigError, ModelLoadError
from engine.model_folder import find_model, has_tokenizer
from engine.models.config import ModelConfig
from engine.models.transformers_config import TransformersConfig, read_model_config

PARAM = "speculative_config.model"


@dataclass(frozen=True, slots=True)
class Draft:
    """A draft model that goes with its target."""

    folder: Path
    model: ModelConfig

    def settings(self, config: EngineConfig) -> EngineConfig:
        """The engine's settings as they hold for its draft model: neither quantized when it is loaded nor with adapters."""
        return replace(
            config, model=str(self.folder), speculative_config=None, quantization=None, enable_lora=False, swap_space_bytes=0
        )  # fmt: skip


def max_context(model: ModelConfig, draft: Draft | None) -> int:
    """Tokens of a sequence that the model and its draft model can both follow."""
    return model.max_context if draft is None else min(model.max_context, draft.model.max_context)


def find_draft(config: EngineConfig, target: ModelConfig, device: torch.device) -> Draft | None:
    """The draft model that the config names; None where it names none.

    Raises:
        ModelNotFoundError, ModelLoadError, UnsupportedModelError: from its folder.
        ConfigError: it has another vocabulary or a shorter context than the engine is to have, or cannot run here.
    """
    speculative = config.speculative_config
    if speculative is None or speculative.model is None:
        return None
    if device.type == "cuda":
        raise ConfigError(
            f"draft models do not run on {device} yet",
            value=speculative.model, limit="cpu", param=PARAM, remedy='Use method="ngram", or device="cpu".',
        )  # fmt: skip
    try:
        folder = find_model(speculative.model)
        model = read_model_config(folder)
    except ModelLoadError as error:
        error.param = PARAM  # not the engine's own model
        raise
    if isinstance(model, TransformersConfig):
        raise ConfigError(
            f"the draft model's architecture {model.architecture} runs through transformers, whose code computes no guesses",
            value=model.architecture, limit="a native architecture", param=PARAM,
            remedy="Name a draft model of a native architecture (docs/architectures.md).",
        )  # fmt: skip
    if model.vocab_size != target.vocab_size:
        raise _other_vocabulary(
            f"the draft model has {model.vocab_size} tokens, its target {target.vocab_size}",
            model.vocab_size, target.vocab_size,
        )  # fmt: skip
    if config.max_model_len is not None and config.max_model_len > model.max_context:
        raise ConfigError(
            f"max_model_len {config.max_model_len} is more than the draft model's context of {model.max_context}",
            value=config.max_model_len, limit=model.max_context, param="max_model_len",
            remedy=f"Set max_model_len={model.max_context} or less, or use a draft model with a longer context.",
        )  # fmt: skip
    return Draft(folder, model)


def check_tokenizers(draft: Draft, target: Path) -> None:
    """Refuse a draft model whose token ids mean other tokens than the target's. Where the target has no tokenizer, ids are all
    that there is.

    Raises:
        ConfigError: naming the first id that differs.
        ModelLoadError: a tokenizer cannot be read.
    """
    if not has_tokenizer(target) or draft.folder == target:
        return
    if not has_tokenizer(draft.folder):
        raise _other_vocabulary(
            "the draft model has no tokenizer, which cannot be told to be its target's", None, str(target)
        )
    ours, theirs = _tokens(draft.folder), _tokens(target)
    if ours != theirs:
        token_id = min(i for i in ours.keys() | theirs.keys() if ours.get(i) != theirs.get(i))
        raise _other_vocabulary(
            f"token {token_id} is {ours.get(token_id)!r} to the draft model and {theirs.get(token_id)!r} to its target",
            ours.get(token_id), theirs.get(token_id),
        )  # fmt: skip


def _tokens(folder: Path) -> dict[int, str]:
    from engine.tokenizer import Tokenizer

    return Tokenizer.from_pretrained(folder).tokens()


def _other_vocabulary(message: str, value: object, limit: object) -> ConfigError:
    return ConfigError(
        f"the draft model has another vocabulary: {message}", value=value, limit=limit, param=PARAM,
        remedy="Name a draft model of the same family, with the same tokenizer.",
    )  # fmt: skip
