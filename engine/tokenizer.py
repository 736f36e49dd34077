"""Tokenizer: text to token ids and back, chat templates, end-of-sequence ids, as a model folder defines them.

Works on the Rust ``tokenizers`` object inside a transformers tokenizer: that one is safe to share between threads (the
transformers wrapper sets truncation on each call and is not), never truncates, and never "cleans up" spaces. Nothing
here imports torch; transformers itself does while it loads a tokenizer whose class is not the generic one.

Boundary: no sampling, no stop texts (``engine.engine``), no HTTP message types (``workbench.api``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from engine.chat_messages import Message, plain_messages, refuse_reserved
from engine.detokenizer import Detokenizers, IncrementalDetokenizer
from engine.errors import InvalidRequestError, ModelLoadError, UnsupportedModelError
from engine.gguf_tokenizer import load_gguf_tokenizer
from engine.model_folder import find_model, is_gguf

__all__ = ["IncrementalDetokenizer", "Message", "Tokenizer", "TokenizerLike"]

# Classes that add nothing to tokenizer.json: they load without AutoTokenizer, and so without torch.
_GENERIC_CLASSES = frozenset({"PreTrainedTokenizerFast", "TokenizersBackend"})
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)


class EncodedTexts(NamedTuple):
    """One text or a pair, as a model reads them together."""

    ids: list[int]
    second_segment: (
        int  # where the tokens of the other kind begin, of models that tell a pair's texts so apart; else 0
    )


class TokenizerLike(Protocol):
    """The surface that the engine and everything above it use; the fake tokenizer has it too."""

    @property
    def eos_token_ids(self) -> frozenset[int]: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def has_chat_template(self) -> bool: ...

    @property
    def chat_template(self) -> str | None: ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def encode_texts(
        self, text: str, pair: str | None = None, max_tokens: int | None = None
    ) -> EncodedTexts: ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...

    def token_text(self, token_id: int) -> str: ...

    @property
    def special_token_ids(self) -> frozenset[int]: ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]: ...

    def detokenizer(self, skip_special_tokens: bool = True) -> IncrementalDetokenizer: ...


class Tokenizer:
    """A model's tokenizer. Immutable once loaded; may be shared by any number of threads.

    `transformers_tokenizer` must wrap a ``tokenizers`` object; `eos_token_ids` are further ids that end a text (those of
    generation_config.json and config.json), joined with the tokenizer's own.

    Raises:
        UnsupportedModelError: a tokenizer written in Python alone.
    """

    def __init__(self, transformers_tokenizer: Any, eos_token_ids: Iterable[int] = ()) -> None:
        backend = getattr(transformers_tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UnsupportedModelError(
                f"the tokenizer class {type(transformers_tokenizer).__name__} has no tokenizer.json form",
                value=type(transformers_tokenizer).__name__,
                limit="tokenizers that the `tokenizers` library can run",
                remedy="Save it as tokenizer.json beside the model.",
                param="model",
            )
        backend.no_truncation()
        backend.no_padding()
        self._wrapper = transformers_tokenizer
        self._backend = backend
        self._detokenizers = Detokenizers(backend)
        own = transformers_tokenizer.eos_token_id
        self.eos_token_ids = frozenset(eos_token_ids) | (frozenset() if own is None else {int(own)})
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @classmethod
    def from_pretrained(cls, path: str | Path, trust_remote_code: bool = False) -> Tokenizer:
        """Load the tokenizer of a folder, GGUF file or hub id. Code that comes with a model runs only with `trust_remote_code`.

        Raises:
            ModelNotFoundError: no such folder or hub id.
            ModelLoadError: no tokenizer files in it, or files that cannot be read.
            UnsupportedModelError: a tokenizer written in Python alone.
        """
        folder = find_model(str(path))
        if is_gguf(folder):
            return cls(load_gguf_tokenizer(folder))
        _require_tokenizer_files(folder)
        return cls(_load_wrapper(folder, trust_remote_code), _configured_eos_ids(folder))

    def tokens(self) -> dict[int, str]:
        """Each id with its token, as the vocabulary spells it."""
        return {i: token for token, i in self._backend.get_vocab(with_added_tokens=True).items()}

    @property
    def has_chat_template(self) -> bool:
        return self._wrapper.chat_template is not None

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Tokens that stand for no text, such as ends and roles."""
        tokens = self._backend.get_added_tokens_decoder()
        return frozenset(i for i, token in tokens.items() if token.special)

    @property
    def chat_template(self) -> str | None:
        """The template's text; of several templates all, one behind the other."""
        template = self._wrapper.chat_template
        return "\n".join(template.values()) if isinstance(template, dict) else template

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, whole and unpadded; `add_special_tokens` adds what the model expects around a text (BOS).

        Raises:
            InvalidRequestError: not a text, or one with half a surrogate pair, which no UTF-8 can hold.
        """
        if not isinstance(text, str):
            raise InvalidRequestError(
                f"a prompt must be text or a list of token ids, got {type(text).__name__}",
                value=text,
                param="prompt",
            )
        ids: list[int] = self._encode(text, add_special_tokens).ids
        return ids

    def encode_texts(self, text: str, pair: str | None = None, max_tokens: int | None = None) -> EncodedTexts:
        """A text or a pair with what the model expects around and between them, at most `max_tokens` in all.

        What is too long loses its end; of a pair the longer one first, as transformers' "longest_first".

        Raises:
            InvalidRequestError: as `encode`, or `max_tokens` has no room for a token of each text.
        """
        parts = [self._encode(each, False) for each in ((text,) if pair is None else (text, pair))]
        if max_tokens is not None:
            room = max_tokens - self._backend.num_special_tokens_to_add(pair is not None)
            if room < len(parts):
                raise InvalidRequestError(
                    f"{max_tokens} tokens have no room for a text: what stands around it takes {max_tokens - room}",
                    value=max_tokens, limit=max_tokens - room + len(parts), param="truncate_prompt_tokens",
                    remedy="Allow more tokens.",
                )  # fmt: skip
            for part, length in zip(
                parts, _longest_first([len(part.ids) for part in parts], room), strict=True
            ):
                part.truncate(length)
        whole = self._backend.post_process(*parts)
        return EncodedTexts(whole.ids, whole.type_ids.index(1) if 1 in whole.type_ids else 0)

    def _encode(self, text: str, add_special_tokens: bool) -> Any:
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeEncodeError) as error:
            raise InvalidRequestError(
                "the text holds a lone surrogate (half of a UTF-16 pair), which is no character",
                value=text,
                remedy="Send the character as UTF-8 or as a full \\ud83d\\ude00 pair.",
                param="prompt",
            ) from error

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; bytes that form no character become U+FFFD. Ids outside the vocabulary show nothing."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token adds in the middle of a text; b"" for an id outside the vocabulary."""
        return self._detokenizers.token_bytes(token_id)

    def token_text(self, token_id: int) -> str:
        """One token for people: its text with its leading space; bytes of a part of a character as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def detokenizer(self, skip_special_tokens: bool = True) -> IncrementalDetokenizer:
        """A new stream's detokenizer: pushes and flush together equal ``decode`` of all its ids."""
        return self._detokenizers.make(skip_special_tokens)

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation as the model was trained to read it.

        Content given as parts is joined when all parts are text; tool-call arguments given as JSON text are parsed, since
        templates expect values. `chat_template_kwargs`: the template's own variables (``enable_thinking`` and the like).

        Raises:
            InvalidRequestError: no chat template, messages of a wrong shape, an order that the template refuses, a variable
                that is no template's to take.
        """
        if not self.has_chat_template:
            raise InvalidRequestError(
                "this model has no chat template",
                remedy="Send a plain prompt instead, or add chat_template.jinja to the model's folder.",
                param="messages",
            )
        more = dict(chat_template_kwargs or {})
        refuse_reserved(more)
        text = self._render(plain_messages(messages), tools, add_generation_prompt, more)
        return self.encode(text, add_special_tokens=False)

    def _render(
        self,
        messages: list[dict[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        more: dict[str, Any],
    ) -> str:
        from jinja2 import TemplateError

        try:
            text: str = self._wrapper.apply_chat_template(
                messages,
                tools=[dict(tool) for tool in tools] if tools else None,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **more,
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            # The template is the model's own program: whatever it raises is its verdict on these messages.
            raise InvalidRequestError(
                f"the model's chat template refuses these messages: {error}", value=messages, param="messages"
            ) from error
        return text


def _longest_first(lengths: list[int], room: int) -> list[int]:
    """Lengths of one or two texts, cut to `room` in all by shortening the longer one first."""
    if sum(lengths) <= room:
        return lengths
    if len(lengths) == 1:
        return [room]
    shorter = min(*lengths, room // 2)
    return [shorter, room - shorter] if lengths[0] <= lengths[1] else [room - shorter, shorter]


def _require_tokenizer_files(folder: Path) -> None:
    """Refuse a folder without a tokenizer: transformers would invent an empty one for some model types."""
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ModelLoadError(
            f"the folder {str(folder)!r} holds no tokenizer",
            value=str(folder),
            limit=_TOKENIZER_FILES,
            remedy="Copy tokenizer.json and tokenizer_config.json from the base model into it.",
            param="model",
        )


def _load_wrapper(folder: Path, trust_remote_code: bool) -> Any:
    """The transformers tokenizer of a folder."""
    config = _read_json(folder / "tokenizer_config.json")
    generic = config.get("tokenizer_class") in _GENERIC_CLASSES and "auto_map" not in config
    try:
        if generic:
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.from_pretrained(folder)
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers and tokenizers raise bare Exception for broken files
        asks_for_trust = "trust_remote_code" in str(error)
        raise ModelLoadError(
            f"the tokenizer of {str(folder)!r} cannot be loaded: {error}",
            value=str(folder),
            remedy="Set trust_remote_code=True if you trust the code that comes with the model."
            if asks_for_trust
            else "Check tokenizer.json and tokenizer_config.json.",
            param="trust_remote_code" if asks_for_trust else "model",
        ) from error


def _configured_eos_ids(folder: Path) -> frozenset[int]:
    """End-of-sequence ids that the model's configuration names; chat models often have one more than the tokenizer."""
    config = _read_json(folder / "config.json")
    text_config = config.get("text_config")
    ids: set[int] = set()
    for source in (_read_json(folder / "generation_config.json"), config, text_config):
        value = source.get("eos_token_id") if isinstance(source, dict) else None
        ids.update(v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int))
    return frozenset(ids)


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object beside the model; {} when there is none."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ModelLoadError(f"{path} is not valid JSON: {error}", value=str(path), param="model") from error
    return value if isinstance(value, dict) else {}
