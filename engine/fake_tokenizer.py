"""FakeTokenizer: bytes as tokens, with a chat template, for engines that run on a FakeRunner.

It has the surface of ``engine.tokenizer.Tokenizer`` and needs no files.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from engine.chat_messages import Message, refuse_reserved
from engine.tokenizer import EncodedTexts


class FakeTokenizer:
    """Bytes as tokens 0 … 255, then the special tokens. The surface of ``engine.tokenizer.Tokenizer``."""

    SPECIAL = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
    EOS = 256
    chat_template: str | None = None  # its text says nothing of calls or reasoning

    def __init__(self) -> None:
        self.eos_token_ids: frozenset[int] = frozenset({self.EOS})
        self.vocab_size = 256 + len(self.SPECIAL)
        self.has_chat_template = True
        self.special_token_ids = frozenset(range(256, self.vocab_size))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The text's UTF-8 bytes; special tokens are recognised by their text."""
        del add_special_tokens  # there is nothing that would be added
        ids: list[int] = []
        while text:
            at, special = min(
                (text.find(s), i) if s in text else (len(text), -1) for i, s in enumerate(self.SPECIAL)
            )
            ids += text[:at].encode()
            if special < 0:
                break
            ids.append(256 + special)
            text = text[at + len(self.SPECIAL[special]) :]
        return ids

    def encode_texts(self, text: str, pair: str | None = None, max_tokens: int | None = None) -> EncodedTexts:
        """The texts' tokens, one behind the other, cut at the end."""
        first = self.encode(text)
        ids = (first + self.encode(pair or ""))[:max_tokens]
        return EncodedTexts(ids, 0 if pair is None else min(len(first), len(ids)))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        detokenizer = self.detokenizer(skip_special_tokens)
        return detokenizer.push(ids) + detokenizer.flush()

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """``<|role|>content<|end|>`` for each message; tools travel as a system message. There are no variables."""
        refuse_reserved(chat_template_kwargs or {})
        text = f"<|system|>{list(tools)!r}<|end|>" if tools else ""
        for message in messages:
            text += f"<|{message['role']}|>{message.get('content') or ''}<|end|>"
        return self.encode(text + "<|assistant|>" * add_generation_prompt)

    def token_text(self, token_id: int) -> str:
        if token_id >= 256:
            return self.SPECIAL[token_id - 256]
        return bytes([token_id]).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else self.token_text(token_id).encode()

    def detokenizer(self, skip_special_tokens: bool = True) -> FakeDetokenizer:
        return FakeDetokenizer(self, skip_special_tokens)


class FakeDetokenizer:
    """Bytes to text, never half a character."""

    def __init__(self, tokenizer: FakeTokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """The characters that these tokens complete."""
        text = ""
        for token_id in ids:
            if token_id < 256:
                text += self._decoder.decode(bytes([token_id]))
            elif not self._skip:
                text += self.flush() + self._tokenizer.token_text(token_id)
        return text

    def flush(self) -> str:
        """What is left of an incomplete character, as U+FFFD."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text
