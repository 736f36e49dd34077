"""What must not be written down is not, and what may be is left alone."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.observe.redact import redact

SECRETS = [
    ("mail ada.lovelace+test@mail.example.co.uk now", "ada.lovelace", "[email]"),
    ("call +49 30 901820-17 today", "901820", "[phone]"),
    ("call (415) 555-2671 today", "555-2671", "[phone]"),
    ("call 0171 2345678.", "2345678", "[phone]"),
    ("card 4111 1111 1111 1111 please", "1111 1111", "[card]"),
    ("card 378282246310005 please", "378282246310005", "[card]"),
    ("key sk-proj-abcDEF0123456789abcDEF0123456789 end", "abcDEF0123", "[key]"),
    ("ghp_0123456789abcdefghijABCDEFGHIJ012345", "0123456789", "[key]"),
    ("AKIAIOSFODNN7EXAMPLE", "IOSFODNN7", "[key]"),
    ("hf_abcdefghijklmnopqrstuvwxyz0123", "abcdefghij", "[key]"),
    ("Authorization: Bearer abc.def-ghi_jkl012345", "ghi_jkl", "[key]"),
    ('{"api_key": "0a1b2c3d4e5f"}', "0a1b2c", "[key]"),
    ("password = hunter2222", "hunter2222", "[key]"),
    ("MY_SERVICE_TOKEN=abcd-efgh", "abcd-efgh", "[key]"),
    ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.sig_nature", "eyJzdWI", "[key]"),
    ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\nxyz\n-----END RSA PRIVATE KEY-----\nafter", "MIIE", "[key]"),
    ("-----BEGIN PRIVATE KEY-----\nMIIE cut off", "MIIE", "[key]"),
]


@pytest.mark.parametrize(("text", "secret", "mark"), SECRETS)
def test_a_secret_leaves_the_text(text, secret, mark):
    done = redact(text)
    assert secret not in done
    assert mark in done


@pytest.mark.parametrize(
    "text",
    [
        "The meeting is on 2026-11-20 at 17:30 in room 4.",
        "It costs 1,250.00 and pi is 3.14159265.",
        "Chapter 3.2.1, line 12345, 42 apples.",
        "Her token of thanks; the secret garden; a password manager.",
        "an email without an address: someone at example",
    ],
)
def test_plain_text_stays(text):
    assert redact(text) == text


@given(st.integers(min_value=0, max_value=40_000), st.integers(0, len(SECRETS) - 1))
@settings(max_examples=30, deadline=None)
def test_a_secret_is_found_wherever_long_texts_are_cut(position, which):
    text, secret, _ = SECRETS[which]
    filler = "lorem ipsum dolor sit amet " * 1600
    assert secret not in redact(filler[:position] + " " + text + " " + filler[position:])


def test_hostile_texts_take_linear_time():
    generator = random.Random(0)
    for alphabet in ("1 ", "a.", "a@", "a_token=", "-- BEGIN PRIVATE KEY-----", "(1)-", "+ 0"):
        short = "".join(generator.choices(alphabet, k=20_000))
        began = time.process_time()
        redact(short)
        once = time.process_time() - began
        began = time.process_time()
        redact(short * 8)
        assert time.process_time() - began < 40 * once + 0.5
