"""The tokenizer of a GGUF file: transformers converts its vocabulary; tokens that the file does not have are taken out again.

Boundary: a transformers tokenizer, as ``engine.tokenizer`` wraps it. What ends a turn is in the model's config.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.errors import ModelLoadError
from engine.quantization.gguf_file import GgufFile


def load_gguf_tokenizer(path: Path) -> Any:
    """The transformers tokenizer that a GGUF file's vocabulary becomes.

    Raises:
        ModelLoadError: no vocabulary, or one that transformers does not convert.
    """
    tokens = GgufFile.read(path).metadata.get("tokenizer.ggml.tokens", 0)
    num_tokens = tokens if isinstance(tokens, int) else len(tokens)
    try:
        from transformers import AutoTokenizer

        return _without_additions(AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name), num_tokens)
    except Exception as error:  # transformers raises whatever it meets in a vocabulary that it cannot convert
        raise ModelLoadError(
            f"the tokenizer of {str(path)!r} cannot be made of its metadata: {error}",
            value=str(path),
            remedy="Use the model's own checkpoint, with tokenizer.json and *.safetensors.",
            param="model",
        ) from error


def _without_additions(converted: Any, num_tokens: int) -> Any:
    """The tokenizer without the special tokens that its class brings along: the model has no embedding for their ids."""
    state = json.loads(converted.backend_tokenizer.to_str())
    added = [token for token in state["added_tokens"] if token["id"] < num_tokens]
    if len(added) == len(state["added_tokens"]):
        return converted
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(json.dumps({**state, "added_tokens": added}))
    named = {name: getattr(converted, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    known = {name: token for name, token in named.items() if token and backend.token_to_id(token) is not None}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=converted.chat_template, **known)
