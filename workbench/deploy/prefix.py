"""Which replica is likely to have a prompt's beginning in its prefix cache, and who may get the next request.

A prompt is cut into pieces of 256 characters, each named by a digest of itself and all before it, as the engine names its KV
blocks. The router remembers which replica it sent a piece to last. Affinity yields to load: only replicas that carry at
most a quarter more than the mean are considered for it (bounded loads; Mirrokni, Thorup and Zadimoghaddam 2016).

Boundary: choosing. Nothing of Ray is imported, and nothing is known of what replicas really have cached.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_PIECE_CHARS = 256
_MAX_PIECES = 64  # 16,384 characters tell prompts apart well enough
_MAX_REMEMBERED = 50_000
_MAX_OVER_MEAN = 1.25
_ALWAYS_ALLOWED = 2  # requests: with little load the mean says nothing


@dataclass(frozen=True, slots=True)
class Load:
    """What a replica has to do, as far as a router knows."""

    num_requests: int  # sent and not ended
    num_slots: int  # rows of its batch
    num_waiting_tokens: int = 0  # of what waits for a row there


class PrefixMemory:
    """Pieces of prompts and the replica that had each last; the least recently used are forgotten."""

    def __init__(self, max_pieces: int = _MAX_REMEMBERED) -> None:
        self._max_pieces = max_pieces
        self._replica_of: OrderedDict[str, str] = OrderedDict()

    def remember(self, prefix: Sequence[str], replica: str) -> None:
        """`replica` computes these pieces now."""
        for piece in prefix:
            self._replica_of[piece] = replica
            self._replica_of.move_to_end(piece)
        while len(self._replica_of) > self._max_pieces:
            self._replica_of.popitem(last=False)

    def matches(self, prefix: Sequence[str]) -> dict[str, int]:
        """How many pieces from the beginning on each replica has; replicas with none are left out."""
        found: dict[str, int] = {}
        for number, piece in enumerate(prefix, 1):
            replica = self._replica_of.get(piece)
            if replica is None:
                break
            found[replica] = number
        return found


def rank(loads: Mapping[str, Load], matches: Mapping[str, int]) -> list[str]:
    """The replicas, first choice first.

    Those with a free slot come before those without; among them those that are not overloaded and have most of the prompt,
    then the least loaded.
    """
    mean = sum(load.num_requests for load in loads.values()) / max(len(loads), 1)
    bound = mean * _MAX_OVER_MEAN + _ALWAYS_ALLOWED

    def key(replica: str) -> tuple[bool, int, int, int, str]:
        load = loads[replica]
        matched = matches.get(replica, 0) if load.num_requests < bound else 0
        is_full = load.num_requests >= load.num_slots
        return is_full, -matched, load.num_waiting_tokens, load.num_requests, replica

    return sorted(loads, key=key)


def prefix_chain(body: bytes) -> tuple[str, ...]:
    """The names of a request's pieces, from the JSON body of any of the API's calls; () where there is no prompt in it."""
    try:
        fields = json.loads(body)
    except ValueError:
        return ()
    if not isinstance(fields, dict):
        return ()
    text = "\0".join(_texts(fields))
    if not text:
        return ()
    names: list[str] = []
    digest = hashlib.blake2b(str(fields.get("model", "")).encode("utf-8", "replace"), digest_size=12)
    for start in range(0, min(len(text), _PIECE_CHARS * _MAX_PIECES), _PIECE_CHARS):
        digest.update(text[start : start + _PIECE_CHARS].encode("utf-8", "replace"))
        names.append(digest.copy().hexdigest())
    return tuple(names)


def _texts(fields: Mapping[str, Any]) -> Iterable[str]:
    """What the model reads, in its order: tools, then messages, prompt or input."""
    if fields.get("tools"):
        yield json.dumps(fields["tools"], sort_keys=True)
    for name in ("instructions", "messages", "prompt", "input"):
        value = fields.get(name)
        if isinstance(value, str):
            yield value
        elif isinstance(value, list) and value:
            for item in value:
                yield item if isinstance(item, str) else json.dumps(item, sort_keys=True)
