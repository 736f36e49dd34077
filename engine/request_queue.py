"""RequestQueue: the sequences that wait, in the order in which they are to run.

First those that were put back after a preemption or a failed step; then by priority, lower is earlier (vLLM's rule); then by
their clients' fair shares (``engine.fair_shares``), which is the order of arrival where there is one client; then by arrival.
A heap whose removed entries are passed over: O(log n) a request, O(k log k) to look at the first k.

Boundary: order and counts. Whether a sequence can run is the scheduler's to decide.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from heapq import heapify, heappop, heappush
from itertools import count

from engine.fair_shares import FairShares, Share
from engine.request import Sequence, SequenceStatus

_Entry = tuple[int, float, int, Sequence]  # priority, start of its share, number, and never compared: it

_MIN_GARBAGE = 64  # removed entries that are never worth a new heap


class RequestQueue:
    """What waits in one scheduler. `client_weights`: see FairShares."""

    def __init__(self, client_weights: Mapping[str, float] | None = None) -> None:
        self.num_tokens = 0  # of what waits: prompts, and outputs so far of those put back
        self._shares = FairShares(client_weights)
        self._share_of: dict[str, Share] = {}  # of each live request
        self._returned: OrderedDict[str, Sequence] = OrderedDict()
        self._heap: list[_Entry] = []
        self._queued: dict[str, int] = {}  # the numbers of those in the heap that still wait
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._returned) + len(self._queued)

    def __iter__(self) -> Iterator[str]:
        """The ids of all that waits, in order."""
        return (seq.request_id for seq in self.in_order())

    @property
    def head(self) -> Sequence:
        """Whose turn is next."""
        return next(self.in_order())

    def in_order(self) -> Iterator[Sequence]:
        """All that waits, in order; removing what was yielded does not disturb it."""
        yield from list(self._returned.values())
        self._drop_removed()
        heap = self._heap
        frontier = [(heap[0], 0)] if heap else []
        while frontier:
            entry, place = heappop(frontier)
            for child in range(2 * place + 1, min(2 * place + 3, len(heap))):
                heappush(frontier, (heap[child], child))
            if self._waits(entry):
                yield entry[3]

    # ── in and out ──────────────────────────────────────────────────────────────────────────────────────────────────

    def add(self, seq: Sequence) -> None:
        """A new sequence waits for its turn."""
        request = seq.request
        max_output_tokens = seq.max_total_tokens - seq.num_prompt_tokens
        share = self._shares.begin(request.client, seq.num_prompt_tokens, max_output_tokens)
        number = next(self._numbers)
        self._share_of[seq.request_id] = share
        self._queued[seq.request_id] = number
        self._drop_removed()
        heappush(self._heap, (request.priority, share.start, number, seq))
        self.num_tokens += len(seq.token_ids)

    def put_back(self, seq: Sequence) -> None:
        """One that ran waits again, before all others."""
        self._returned[seq.request_id] = seq
        self._returned.move_to_end(seq.request_id, last=False)
        self.num_tokens += len(seq.token_ids)

    def admit(self, seq: Sequence) -> None:
        """One begins to run, or to run again."""
        is_new = self._remove(seq)
        if is_new:
            self._shares.admit(self._share_of[seq.request_id])

    def end(self, seq: Sequence) -> None:
        """A sequence ended, whether it waits or ran. To be called while it has the status that it had."""
        has_run = seq.status is not SequenceStatus.WAITING or seq.epoch > 0
        if seq.status is SequenceStatus.WAITING:
            self._remove(seq)
        num_tokens = len(seq.token_ids) - seq.num_cached_tokens if has_run else 0
        num_output = len(seq.token_ids) - seq.num_prompt_tokens if has_run else None
        self._shares.end(seq.request.client, self._share_of.pop(seq.request_id), num_tokens, num_output)

    def _remove(self, seq: Sequence) -> bool:
        """Whether it was among those that had not run."""
        self.num_tokens -= len(seq.token_ids)
        if self._queued.pop(seq.request_id, None) is not None:
            return True
        del self._returned[seq.request_id]
        return False

    def _waits(self, entry: _Entry) -> bool:
        return self._queued.get(entry[3].request_id) == entry[2]

    def _drop_removed(self) -> None:
        heap = self._heap
        if len(heap) > 2 * len(self._queued) + _MIN_GARBAGE:
            heap = self._heap = [entry for entry in heap if self._waits(entry)]
            heapify(heap)
        while heap and not self._waits(heap[0]):
            heappop(heap)

    def check_integrity(self) -> None:
        """Prove the counts. O(n log n).

        Raises:
            AssertionError: naming what does not hold.
        """
        everybody = list(self.in_order())
        assert len(everybody) == len(self), f"{len(everybody)} wait, counted {len(self)}"
        num_tokens = sum(len(seq.token_ids) for seq in everybody)
        assert num_tokens == self.num_tokens, f"{num_tokens} tokens wait, counted {self.num_tokens}"
        for seq in everybody:
            assert seq.request_id in self._share_of, f"{seq.request_id} waits without a share"
