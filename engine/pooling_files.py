"""How a model was trained to embed, as sentence-transformers' files in its folder say.

``modules.json`` lists what follows the model: pooling (``1_Pooling/config.json``), normalizing. What cannot be computed here
is refused by name. Without these files a decoder is pooled by its last token and normalized, an encoder by its first token,
as vLLM does.

Boundary: files to values; no torch. Source: sentence-transformers' ``modules.json``, ``models.Pooling``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.errors import ModelLoadError, UnsupportedModelError
from engine.pooling import ModelPooling

# sentence-transformers' settings of its Pooling module -> our names; older folders have one flag each, newer one name
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last",
}
_NAMES = {"cls": "cls", "mean": "mean", "max": "max", "lasttoken": "last"}


def read_pooling(folder: Path, default: ModelPooling) -> ModelPooling:
    """`default` with what the folder says of it.

    Raises:
        UnsupportedModelError: a module or a pooling that is not computed here.
        ModelLoadError: a file that is no JSON.
    """
    modules = _read(folder / "modules.json")
    if not isinstance(modules, list):
        return default
    found = replace(default, normalize=False)
    for module in modules:
        kind, where = str(module.get("type", "")).rpartition(".")[2], folder / str(module.get("path", ""))
        if kind == "Transformer":
            read = _mapping(_read(folder / "sentence_bert_config.json"))
            length = read.get("max_seq_length")
            found = replace(
                found,
                max_length=length if isinstance(length, int) else None,
                lower_case=bool(read.get("do_lower_case")),
            )
        elif kind == "Pooling":
            found = replace(found, kind=_pooling_of(_mapping(_read(where / "config.json")), default))
        elif kind == "Normalize":
            found = replace(found, normalize=True)
        else:
            raise UnsupportedModelError(
                f"modules.json asks for {kind}, which is not computed here", value=kind, param="model",
                limit=("Transformer", "Pooling", "Normalize"), remedy="Use a model without it.",
            )  # fmt: skip
    prompts = _mapping(_mapping(_read(folder / "config_sentence_transformers.json")).get("prompts"))
    return replace(found, prompts={str(name): str(text) for name, text in prompts.items()})


def _pooling_of(config: Mapping[str, Any], default: ModelPooling) -> str:
    if config.get("include_prompt") is False:
        raise UnsupportedModelError(
            "its pooling leaves the prompt's tokens out (include_prompt), which is not computed here", value=False, limit=True,
            param="model", remedy="Use a model without it.",
        )  # fmt: skip
    named = config.get("pooling_mode")
    asked = [flag for flag in config if flag.startswith("pooling_mode_") and config[flag] is True]
    kinds = [_FLAGS.get(flag, flag) for flag in asked] or [_NAMES.get(str(named), str(named))]
    if len(kinds) != 1 or kinds[0] not in default.poolings:
        raise UnsupportedModelError(
            f"its embeddings are pooled by {' and '.join(kinds)}, which is not computed here for this model", value=kinds,
            limit=default.poolings, param="model", remedy="Use a model pooled otherwise.",
        )  # fmt: skip
    return kinds[0]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _read(path: Path) -> Any:
    """The value of a JSON file; None where there is none."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ModelLoadError(f"{path} is not valid JSON: {error}", value=str(path), param="model") from error
