"""FairShares: which of several clients is to be served next, so that each gets its share of the tokens.

Start-time fair queueing: a request gets a start tag when it comes, in tokens of virtual time: the later one of the time now and
of where its client's earlier requests end. Requests run in the order of their tags, so that who asks for much waits behind
itself, not before others; the requests of one client keep their order. Virtual time goes on by what is admitted over the
weights of all clients that have requests: who waits is overtaken by newcomers for a bounded time, however many they are.

How long an output gets is not known when its request comes: it is charged with the mean of the outputs before it, and the error
is added to the client's next request. O(1) a request, amortised; clients without requests and debt are forgotten.

Boundary: numbers. The order itself is kept by ``engine.request_queue``.

Source: Goyal, Vin, Cheng, "Start-time Fair Queueing", SIGCOMM 1996; tokens as the measure of service: Sheng et al., "Fairness in
Serving Large Language Models", OSDI 2024.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_FIRST_OUTPUT_TOKENS = 128.0  # expected until a request has ended
_MEMORY = 1 / 16  # how much of the mean each ended request is
_SWEEP = 64  # clients below which none is looked for that can be forgotten


@dataclass(slots=True)
class _Client:
    weight: float
    end: float  # virtual time at which its requests so far have had their share
    num_live: int = 0
    debt: float = 0.0  # tokens used beyond what was charged; negative: charged in vain


@dataclass(frozen=True, slots=True)
class Share:
    """A request's place in virtual time, and what its client was charged for it."""

    start: float
    num_tokens: float  # expected of it
    charge: float  # that, and what the client owed or had paid for earlier requests


class FairShares:
    """Clients of the live requests of one scheduler. `weights`: shares by client; 1 for those that are not in it."""

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._weights = dict(weights or {})
        self._clients: dict[str, _Client] = {}
        self._num_live = 0  # requests
        self._now = 0.0
        self._active_weight = 0.0  # of the clients with live requests
        self._mean_output = _FIRST_OUTPUT_TOKENS
        self._sweep_at = _SWEEP

    def __len__(self) -> int:
        """Clients that are remembered."""
        return len(self._clients)

    def begin(self, client: str, num_prompt_tokens: int, max_output_tokens: int) -> Share:
        """A request of this client came."""
        known = self._clients.get(client)
        if known is None:
            self._forget_settled()
            known = self._clients[client] = _Client(self._weights.get(client, 1.0), self._now)
        if not known.num_live:
            self._active_weight += known.weight
        known.num_live += 1
        self._num_live += 1
        expected = num_prompt_tokens + min(max_output_tokens, self._mean_output)
        charge = max(1.0, expected + known.debt)
        known.debt += expected - charge
        start = max(self._now, known.end)
        known.end = start + charge / known.weight
        return Share(start, expected, charge)

    def admit(self, share: Share) -> None:
        """A request began to run."""
        self._now = max(self._now, share.start) + share.charge / self._active_weight

    def end(self, client: str, share: Share, num_tokens: int, num_output_tokens: int | None) -> None:
        """A request ended after `num_tokens` in all. `num_output_tokens`: of them; None: it never ran."""
        known = self._clients[client]
        known.num_live -= 1
        known.debt += num_tokens - share.num_tokens
        if num_output_tokens is not None:
            self._mean_output += _MEMORY * (num_output_tokens - self._mean_output)
        self._num_live -= 1
        if not known.num_live:
            self._active_weight -= known.weight
        if not self._num_live:  # nobody competes: who comes next begins anew
            self._clients.clear()
            self._active_weight = 0.0

    def _forget_settled(self) -> None:
        """Drop clients that have no requests and owe nothing, whenever they may be half of all."""
        if len(self._clients) >= self._sweep_at:
            for name, known in list(self._clients.items()):
                if not known.num_live and known.end + known.debt / known.weight <= self._now:
                    del self._clients[name]
            self._sweep_at = 2 * len(self._clients) + _SWEEP
