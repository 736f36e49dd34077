"""The rule of the fake model: what a slot of its KV cache holds, and which token follows.

Boundary: arithmetic that anybody can do by hand; ``engine.fake_runner`` runs it.
"""

from __future__ import annotations

from collections.abc import Sequence

STATE_MODULUS = 65521
UNWRITTEN = -1


def next_state(state: int, token_id: int) -> int:
    """What a slot holds: the past's state (0 before the first token) and this token."""
    return (3 * state + token_id + 1) % STATE_MODULUS


def next_token(state: int, position: int, vocab_size: int) -> int:
    """The token that follows position `position`, whose slot holds `state`."""
    return (state + 7 * position) % vocab_size


def expected_tokens(prompt: Sequence[int], num_tokens: int, vocab_size: int) -> list[int]:
    """The first `num_tokens` output tokens for `prompt`, worked out without engine, blocks or batches."""
    state = 0
    for token in prompt:
        state = next_state(state, token)
    output: list[int] = []
    for position in range(len(prompt) - 1, len(prompt) - 1 + num_tokens):
        output.append(next_token(state, position, vocab_size))
        state = next_state(state, output[-1])
    return output
