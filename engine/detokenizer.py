"""Incremental detokenization: token ids in, text out, as soon as the text is certain.

A token is not a piece of text: it may end in the middle of a character, and the first one may lose a leading space. The
classes here give out text whose concatenation equals decoding all ids at once, never emit half a character, and spend
amortised O(1) a token. Which class serves is read off the tokenizer's own decoder:

    ByteLevelDetokenizer   byte-level BPE (GPT-2, Llama 3, Qwen): tokens are bytes, joined by an incremental UTF-8 decoder
    PieceDetokenizer       metaspace and byte-fallback (Llama 2, Mistral, Gemma): tokens are text or single bytes
    WindowDetokenizer      any other decoder: decodes a short window twice and emits the difference

Boundary: ids to text. Loading, encoding and chat templates are in ``engine.tokenizer``; stop texts in the engine.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

REPLACEMENT = "\ufffd"
WINDOW_HOLD_TOKENS = 16  # a window that stays undecodable for so many tokens is emitted as it is
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Backend(Protocol):
    """What is used of ``tokenizers.Tokenizer``."""

    decoder: Any

    def id_to_token(self, id: int) -> str | None: ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...

    def get_added_tokens_decoder(self) -> dict[int, Any]: ...


class IncrementalDetokenizer(Protocol):
    """One stream's state. Not thread-safe: one reader."""

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that became certain with these tokens; "" when there is none yet."""
        ...

    def flush(self) -> str:
        """What was held back, invalid bytes as U+FFFD. Nothing may be pushed afterwards."""
        ...


class Detokenizers:
    """Makes the detokenizers of one tokenizer; they share its tables of decoded tokens."""

    def __init__(self, backend: Backend) -> None:
        special = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        everything = _Flavour(backend, frozenset())
        self._flavours = {False: everything, True: _Flavour(backend, special)}
        self.token_bytes = everything.token_bytes

    def make(self, skip_special_tokens: bool = True) -> IncrementalDetokenizer:
        return self._flavours[skip_special_tokens].make()


class _Flavour:
    """The class and table that serve one tokenizer, with the tokens in `hidden` showing nothing."""

    def __init__(self, backend: Backend, hidden: frozenset[int]) -> None:
        self.make: Callable[[], IncrementalDetokenizer]
        self.token_bytes: Callable[[int], bytes]  # b"" for an id that the vocabulary does not have
        stages = _decoder_stages(backend.decoder)
        if [stage["type"] for stage in stages] == ["ByteLevel"]:
            byte_table = _ByteTable(backend, hidden)
            self.make = partial(ByteLevelDetokenizer, byte_table)
            self.token_bytes = byte_table.token_bytes
        elif (plan := _piece_plan(stages)) is not None:
            piece_table = _PieceTable(backend, plan, hidden)
            self.make = partial(PieceDetokenizer, piece_table)
            self.token_bytes = piece_table.token_bytes
        else:
            self.make = partial(WindowDetokenizer, backend, hidden)
            self.token_bytes = lambda token_id: backend.decode([token_id], skip_special_tokens=False).encode()


class ByteLevelDetokenizer:
    """Tokens are bytes; an incremental UTF-8 decoder holds back an unfinished character (at most three bytes)."""

    __slots__ = ("_aligned", "_table", "_utf8")

    def __init__(self, table: _ByteTable) -> None:
        self._table = table
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._aligned = True  # no unfinished character is held

    def push(self, token_ids: Sequence[int]) -> str:
        table = self._table
        if self._aligned and len(token_ids) == 1:
            text = table.whole_text(token_ids[0])
            if text is not None:
                return text
        text = self._utf8.decode(b"".join([table.token_bytes(i) for i in token_ids]))
        self._aligned = not self._utf8.getstate()[0]
        return text

    def flush(self) -> str:
        self._aligned = True
        return self._utf8.decode(b"", final=True)


class PieceDetokenizer:
    """Tokens are text or, with byte fallback, single bytes.

    A run of byte tokens is held until a text token or the end closes it: the decoder judges a run as a whole, and turns
    each byte of an invalid run into U+FFFD.
    """

    __slots__ = ("_first", "_run", "_strip_left", "_table")

    def __init__(self, table: _PieceTable) -> None:
        self._table = table
        self._run = bytearray()
        self._first = True
        self._strip_left = table.plan.strip_count

    def push(self, token_ids: Sequence[int]) -> str:
        pieces: list[str] = []
        table = self._table
        for token_id in token_ids:
            piece = table.piece(token_id)
            if piece is None:
                continue
            if isinstance(piece, int):
                self._run.append(piece)
            else:
                if self._run:
                    pieces.append(self._close_run())
                pieces.append(table.first_piece(token_id) if self._first else piece)
            self._first = False
        text = "".join(pieces)
        return self._strip(text) if self._strip_left else text

    def flush(self) -> str:
        return self._strip(self._close_run()) if self._run else ""

    def _close_run(self) -> str:
        data = bytes(self._run)
        self._run.clear()
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return REPLACEMENT * len(data)

    def _strip(self, text: str) -> str:
        """Drop the stream's leading space(s): only its very beginning may lose one."""
        cut = 0
        while self._strip_left and cut < len(text):
            if text[cut] == self._table.plan.strip_char:
                cut += 1
                self._strip_left -= 1
            else:
                self._strip_left = 0
        return text[cut:]


class WindowDetokenizer:
    """For decoders that are known only by their result: decode the last token(s) with and without the new ones."""

    __slots__ = ("_backend", "_context", "_hidden", "_new")

    def __init__(self, backend: Backend, hidden: frozenset[int]) -> None:
        self._backend = backend
        self._hidden = hidden
        # The last emitted token: how a token reads may depend on having a left neighbour.
        self._context: list[int] = []
        self._new: list[int] = []

    def push(self, token_ids: Sequence[int]) -> str:
        self._new.extend(
            i for i in token_ids if i not in self._hidden and self._backend.id_to_token(i) is not None
        )
        return self._emit(len(self._new) > WINDOW_HOLD_TOKENS)

    def flush(self) -> str:
        return self._emit(force=True)

    def _emit(self, force: bool) -> str:
        if not self._new:
            return ""
        before = self._backend.decode(self._context, skip_special_tokens=False)
        text = self._backend.decode(self._context + self._new, skip_special_tokens=False)
        if text.endswith(REPLACEMENT) and not force:
            return ""
        self._context = self._new[-1:]
        self._new = []
        return text[len(before) :]


class _ByteTable:
    """Lazily decoded tokens of a byte-level vocabulary. Entries are only added, so that threads may share it."""

    def __init__(self, backend: Backend, hidden: frozenset[int]) -> None:
        self._backend = backend
        self._byte_of_char = _byte_of_char()
        self._bytes: dict[int, bytes] = dict.fromkeys(hidden, b"")
        self._whole: dict[int, str | None] = dict.fromkeys(hidden, "")

    def token_bytes(self, token_id: int) -> bytes:
        data = self._bytes.get(token_id)
        if data is None:
            token = self._backend.id_to_token(token_id) or ""
            try:
                data = bytes([self._byte_of_char[c] for c in token])
            except KeyError:  # an added token with characters outside the byte alphabet stands for itself
                data = token.encode()
            self._bytes[token_id] = data
        return data

    def whole_text(self, token_id: int) -> str | None:
        """The token's text where it is whole characters, else None."""
        try:
            return self._whole[token_id]
        except KeyError:
            try:
                text: str | None = self.token_bytes(token_id).decode("utf-8")
            except UnicodeDecodeError:
                text = None
            self._whole[token_id] = text
            return text


@dataclass(frozen=True, slots=True)
class _PiecePlan:
    """What a decoder of the SentencePiece kind does to its tokens."""

    replacements: tuple[tuple[str, str], ...]
    byte_fallback: bool
    drop_in_first: str = ""  # removed from the first token instead of replaced
    strip_char: str = ""
    strip_count: int = 0


class _PieceTable:
    """Lazily decoded tokens of a vocabulary of text pieces: str is text, int one byte, None an id that shows nothing."""

    def __init__(self, backend: Backend, plan: _PiecePlan, hidden: frozenset[int]) -> None:
        self.plan = plan
        self._backend = backend
        self._pieces: dict[int, str | int | None] = dict.fromkeys(hidden, None)

    def piece(self, token_id: int) -> str | int | None:
        try:
            return self._pieces[token_id]
        except KeyError:
            piece = self._decode(token_id)
            self._pieces[token_id] = piece
            return piece

    def first_piece(self, token_id: int) -> str:
        if self.plan.drop_in_first:
            return (self._backend.id_to_token(token_id) or "").replace(self.plan.drop_in_first, "")
        piece = self.piece(token_id)
        return piece if isinstance(piece, str) else ""

    def token_bytes(self, token_id: int) -> bytes:
        piece = self.piece(token_id)
        if isinstance(piece, int):
            return bytes([piece])
        return (piece or "").encode()

    def _decode(self, token_id: int) -> str | int | None:
        token = self._backend.id_to_token(token_id)
        if token is None:
            return None
        for old, new in self.plan.replacements:
            token = token.replace(old, new)
        if self.plan.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return int(match[1], 16)
        return token


def _decoder_stages(decoder: Any) -> list[dict[str, Any]]:
    """The decoder's stages as plain values (a ``tokenizers`` decoder pickles as JSON)."""
    if decoder is None:
        return []
    state = json.loads(decoder.__getstate__())
    stages: list[dict[str, Any]] = state["decoders"] if state["type"] == "Sequence" else [state]
    return stages


def _piece_plan(stages: list[dict[str, Any]]) -> _PiecePlan | None:
    """The plan of a metaspace or byte-fallback decoder; None for one that does anything else."""
    if [s["type"] for s in stages] == ["Metaspace"]:
        mark = stages[0]["replacement"]
        drop = "" if stages[0].get("prepend_scheme") == "never" else mark
        return _PiecePlan(replacements=((mark, " "),), byte_fallback=False, drop_in_first=drop)
    rest = list(stages)
    replacements = []
    while rest and rest[0]["type"] == "Replace" and "String" in rest[0]["pattern"]:
        stage = rest.pop(0)
        replacements.append((stage["pattern"]["String"], stage["content"]))
    if [s["type"] for s in rest[:2]] != ["ByteFallback", "Fuse"]:
        return None
    strip = rest[2:]
    if not strip:
        return _PiecePlan(tuple(replacements), byte_fallback=True)
    if len(strip) > 1 or strip[0]["type"] != "Strip" or strip[0]["stop"]:
        return None
    return _PiecePlan(
        tuple(replacements), byte_fallback=True, strip_char=strip[0]["content"], strip_count=strip[0]["start"]
    )


def _byte_of_char() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for.

    Printable bytes stand for themselves, the others are moved behind U+0100 in order.
    Source: the encoder of GPT-2 (Radford et al. 2019), which byte-level vocabularies keep.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    table = {chr(b): b for b in printable}
    moved = (b for b in range(256) if b not in printable)
    table.update({chr(0x100 + n): b for n, b in enumerate(moved)})
    return table
