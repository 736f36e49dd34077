"""NgramIndex: where the end of a growing text occurred before, and what followed it there.

Boundary: tokens in, guesses out. Its cost follows the tokens that are new, never the text's length: a long text is taken in
piece by piece, over several calls.
"""

from __future__ import annotations

from itertools import count

MAX_NEW_TOKENS = 2048  # taken in by one call: what a long prompt may cost one step


class NgramIndex:
    """Of one sequence: for each n in [shortest, longest], the place behind the latest earlier occurrence of each n-gram.

    Source: prompt lookup decoding (Saxena 2023); vLLM's `ngram` method has the same settings.
    """

    __slots__ = ("_behind", "_num_indexed", "_sizes")

    def __init__(self, shortest: int, longest: int) -> None:
        self._sizes = range(longest, shortest - 1, -1)
        self._behind: dict[tuple[int, ...], int] = {}  # by n-gram, of any size
        self._num_indexed = 0  # n-grams that end before this place are known

    def guess(self, token_ids: list[int], limit: int) -> list[int]:
        """At most `limit` tokens that followed the longest end of the text that occurred before; empty where none did.

        `token_ids` is the text of the calls before, grown at its end.
        """
        end = len(token_ids)
        self._take_in(token_ids, min(end, self._num_indexed + MAX_NEW_TOKENS))
        if self._num_indexed < end:
            return []
        for size in self._sizes:
            place = self._behind.get(tuple(token_ids[-size:])) if size < end else None
            if place is not None:
                return _followed(token_ids, place, limit)
        return []

    def _take_in(self, token_ids: list[int], end: int) -> None:
        """Know the n-grams that end before `end`; the text's own end is not one that occurred before."""
        for size in self._sizes:
            first = max(0, self._num_indexed - size)
            piece = token_ids[first : end - 1]
            if len(piece) >= size:
                grams = zip(*(piece[i:] for i in range(size)), strict=False)
                self._behind.update(zip(grams, count(first + size)))
        self._num_indexed = end


def _followed(token_ids: list[int], place: int, limit: int) -> list[int]:
    """What follows `place`; a text that repeats itself up to its end goes on repeating."""
    found = token_ids[place : place + limit]
    period = len(token_ids) - place
    while len(found) < limit:
        found.append(found[len(found) - period])
    return found
