"""Redaction: e-mail addresses, phone numbers, card numbers and keys leave a text before it is written anywhere.

Each find is replaced by its kind in brackets, so that a reader sees that something was there. It errs towards removing: a
long number that could be a phone number goes. What no pattern can know (names, addresses, secrets without a form) stays;
where that matters, text must be off.

Boundary: text in, text out; no state. Patterns are linear, and long texts are taken in pieces, because a search holds the
interpreter that the engine's thread needs.
"""

from __future__ import annotations

import re

_PIECE = 16_384  # characters searched at once
_PRIVATE_KEY = re.compile(r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----.*?(?:-----END [A-Z ]{0,40}PRIVATE KEY-----|\Z)", re.DOTALL)  # fmt: skip
_TOKENS = re.compile(
    r"""\b(?:
        (?:sk|pk|rk)[-_][A-Za-z0-9_-]{16,}              # OpenAI, Anthropic, Stripe
      | gh[pousr]_[A-Za-z0-9]{20,} | github_pat_[A-Za-z0-9_]{20,}
      | glpat-[A-Za-z0-9_-]{16,} | hf_[A-Za-z0-9]{20,} | npm_[A-Za-z0-9]{20,}
      | xox[abeoprs]-[A-Za-z0-9-]{10,}                  # Slack
      | (?:AKIA|ASIA)[A-Z0-9]{16} | AIza[A-Za-z0-9_-]{30,}
      | eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*  # JSON web tokens
    )""",
    re.VERBOSE,
)
_USERINFO = re.compile(r"(://[^\s/@:]{0,256}:)[^\s/@]{1,256}@")  # a password in an address
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/-]{12,}=*")
# A name that says secret, then its value: in assignments, JSON and headers.
_NAMED = re.compile(
    r"""(?ix)\b((?:[a-z0-9]{1,20}[-_]){0,4}(?:api[-_]?key|secret|token|passw(?:or)?d|access[-_]?key|private[-_]?key)
        (?:[-_][a-z0-9]{1,20}){0,2}["']?\s{0,3}[:=]\s{0,3}["']?)(?!\[)[^\s"',;}{]{4,}"""
)
_EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}\b"
)
_CARD = re.compile(r"(?<![\d.])\d(?:[ -]?\d){12,18}(?![\d.]?\d)")
_PHONE = re.compile(
    r"(?<![\w.])(?:\+|00)?(?:\(\d{1,5}\)|\d{1,5})(?:[ ./-]{0,2}(?:\(\d{1,5}\)|\d{1,5})){1,7}(?!\w)"
)
_DATE = re.compile(r"(?:\d{4}[-./]\d{1,2}[-./]\d{1,2}|\d{1,2}[-./]\d{1,2}[-./]\d{2,4})(?:[ ]\d{1,2})?")
_DECIMAL = re.compile(r"\d+\.\d+")
# Between words, where no find begins before and ends behind: no number, no "key:", no "Bearer" in front of it.
_CUT = re.compile(r"""(?<![\d ().+:="'rRcC-])\s(?=[^\d\s().+:=-])""")


def redact(text: str) -> str:
    """`text` with every find replaced by ``[email]``, ``[phone]``, ``[card]`` or ``[key]``."""
    if "PRIVATE KEY-----" in text:
        text = _PRIVATE_KEY.sub("[key]", text)
    return "".join(_redact_piece(piece) for piece in _pieces(text))


def redact_secrets(text: str) -> str:
    """`text` without keys, tokens and passwords; addresses and numbers stay. For log lines."""
    if "PRIVATE KEY-----" in text:
        text = _PRIVATE_KEY.sub("[key]", text)
    return _USERINFO.sub(r"\1[key]@", "".join(_redact_keys(piece) for piece in _pieces(text)))


def _redact_keys(text: str) -> str:
    text = _NAMED.sub(r"\1[key]", text)
    text = _BEARER.sub(r"\1 [key]", text)
    return _TOKENS.sub("[key]", text)


def _redact_piece(text: str) -> str:
    text = _redact_keys(text)
    if "@" in text:
        text = _EMAIL.sub("[email]", text)
    text = _CARD.sub(_card, text)
    return _PHONE.sub(_phone, text)


def _card(found: re.Match[str]) -> str:
    digits = [int(character) for character in found[0] if character.isdigit()]
    doubled = [digit * 2 - 9 * (digit > 4) for digit in digits[-2::-2]]
    return "[card]" if (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0 else found[0]


def _phone(found: re.Match[str]) -> str:
    """Seven to fifteen digits written as one number; dates and short figures stay."""
    text = found[0]
    num_digits = sum(character.isdigit() for character in text)
    international = text.startswith(("+", "00"))
    is_phone = 7 <= num_digits <= 15 and not (_DATE.fullmatch(text) or _DECIMAL.fullmatch(text))
    return "[phone]" if is_phone or (international and num_digits >= 6) else text


def _pieces(text: str) -> list[str]:
    """`text` cut where nothing to find can be cut in two."""
    pieces, start = [], 0
    while len(text) - start > _PIECE:
        cut = _CUT.search(text, start + _PIECE)
        if cut is None:
            break
        pieces.append(text[start : cut.end()])
        start = cut.end()
    pieces.append(text[start:])
    return pieces
