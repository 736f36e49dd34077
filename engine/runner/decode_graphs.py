"""Decode steps of fixed sizes, captured once and replayed: what a launch costs the host is paid once.

A step in which every row computes one token is padded to the next size. Its inputs come in one copy to a place that never
moves; everything else (tokens, tables, settings, caches, weights) stays on the device. The forward pass and the sampler are
captured apart, so that a mask that needs the last token can be uploaded between them. Rows with controls (penalties, biases,
bans) have a sampler of their own, and so have rows with typical_p, which is captured when such a row first decodes in a step of
that size; its memory, for controls a copy of the logits, comes from what the KV cache's sizing leaves free.

`Replay` is the seam: CudaGraphs makes CUDA graphs. Work that is captured may not wait for the device, may not look at
host values that change, and may not read memory that another step allocates.

Boundary: decode steps without admissions; the runner makes all others operation by operation.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import product
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from engine.attention.interface import AttentionMetadata, CapturableAttention
from engine.models.decoder import LayerCache, StepDecoder
from engine.plan import StepPlan
from engine.runner.adapters import Adapters
from engine.runner.device_batch import DeviceRowBatch
from engine.runner.sampler import Sampled

MAX_SIZE = 512  # rows of the largest captured step
NUM_INPUTS = 4  # rows, positions, new blocks, rows that want log-probabilities
NO_BLOCK = -1


class Replay(Protocol):
    """Does a piece of work whose launches are always the same."""

    def __call__(self, key: Hashable, work: Callable[[], None]) -> None:
        """Do the work; the first time with this key it is captured, and replayed from then on."""
        ...

    def close(self) -> None:
        """Give back what the captured work holds."""
        ...


class CudaGraphs:
    """CUDA graphs, all from one memory pool: they run one after the other, never beside each other."""

    def __init__(self) -> None:
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}

    def __call__(self, key: Hashable, work: Callable[[], None]) -> None:
        """Do the work; the first time with this key it is captured, and replayed from then on."""
        graph = self._graphs.get(key)
        if graph is None:
            # Once as it is: kernels are compiled and libraries take their workspaces. What it writes, the replay writes again.
            work()
            graph = torch.cuda.CUDAGraph()
            pool = next((made.pool() for made in self._graphs.values()), None)
            # Other threads may use their devices meanwhile.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                work()
            self._graphs[key] = graph
        graph.replay()

    def close(self) -> None:
        """Give back what the captured work holds."""
        for graph in self._graphs.values():
            graph.reset()
        self._graphs.clear()


class DecodeGraphs:
    """The captured decode steps of one runner."""

    def __init__(
        self,
        decoder: StepDecoder,
        attention: CapturableAttention,
        caches: list[LayerCache],
        batch: DeviceRowBatch,
        replay: Replay,
        *,
        max_inflight: int,
        adapters: Adapters | None = None,
    ) -> None:
        shape, device = batch.shape, batch.device
        self.sizes = captured_sizes(shape.max_num_seqs)
        self._decoder, self._attention, self._caches, self._batch = decoder, attention, caches, batch
        self._replay, self._adapters = replay, adapters
        most = self.sizes[-1]
        self._short = min(attention.short_context, shape.max_model_len)
        num_blocks, _, block_size, head_size = caches[0].k.shape
        attention.prepare_capture(
            num_blocks * block_size, most, shape.max_model_len, decoder.config.num_heads, head_size, device
        )
        self._inputs = torch.zeros(NUM_INPUTS * most, dtype=torch.int32, device=device)
        # A copy to the device reads its host memory later: as many as there are steps under way.
        self._staging = torch.zeros(
            max_inflight, NUM_INPUTS * most, dtype=torch.int32, pin_memory=device.type == "cuda"
        )
        self._turn = 0
        self._query_start = torch.arange(most + 1, dtype=torch.int32, device=device)
        self._logits = torch.zeros(most, shape.vocab_size, device=device)
        self._token_ids = torch.zeros(most, dtype=torch.int32, device=device)

    def size_for(self, plan: StepPlan) -> int:
        """The size that this step is padded to; 0 where it has to be made operation by operation."""
        batch, rows = self._batch, plan.num_rows
        if (
            plan.admitted
            or rows > self.sizes[-1]
            or len(plan.logit_rows) < rows
            or int(plan.num_tokens.max()) > 1
        ):
            return 0
        if len(batch.scored(plan)):
            return 0
        if not self._attention.fits_captured(plan.start + 1):
            return 0
        return next(size for size in self.sizes if size >= rows)

    def send(self, plan: StepPlan, size: int) -> None:
        """Upload the step's rows, positions and new blocks in one copy."""
        batch, rows = self._batch, plan.num_rows
        staging = self._staging[self._turn][: NUM_INPUTS * size]
        self._turn = (self._turn + 1) % len(self._staging)
        columns = staging.numpy().reshape(NUM_INPUTS, size)
        columns[0, :rows], columns[0, rows:] = plan.rows, batch.idle_row
        columns[1, :rows], columns[1, rows:] = plan.start, 0
        columns[2] = NO_BLOCK
        columns[2, np.nonzero(np.diff(plan.new_block_offsets[0]))[0]] = plan.new_block_ids[0]
        wanted = batch.wanted(plan)
        columns[3, : len(wanted)] = wanted
        batch.forget_block_deltas()
        self._inputs[: NUM_INPUTS * size].copy_(staging, non_blocking=True)

    def forward(self, plan: StepPlan, size: int) -> None:
        """Run the model on the inputs that were sent last."""
        uses_lora = self._adapters is not None and self._adapters.are_used(plan)
        self._run_forward(size, is_short=int(plan.start.max()) < self._short, uses_lora=uses_lora)

    def choose(self, plan: StepPlan, size: int) -> Sampled:
        """Sample from the logits of this step, and put the tokens behind their rows' last ones."""
        batch, rows = self._batch, plan.num_rows
        is_controlled = bool(len(batch.controlled(plan)))
        self._run_sampler(
            size,
            is_filtered=is_controlled or batch.is_filtered(plan),
            is_typical=batch.is_typical(plan),
            is_controlled=is_controlled,
        )
        wanted = self._columns(size)[3, : len(batch.wanted(plan))]
        return batch.sampled(self._logits[:rows], self._token_ids[:rows], plan, wanted)

    def capture(self, sizes: Sequence[int], tell: Callable[[float], None]) -> None:
        """Capture these sizes now, largest first, so that no request waits for it; `tell` hears the share that is done."""
        for place, size in enumerate(sorted(sizes, reverse=True)):
            self._columns(size)[:3] = torch.tensor(
                [[self._batch.idle_row], [0], [NO_BLOCK]], dtype=torch.int32, device=self._batch.device
            )
            for is_short, uses_lora in product({False, self._short > 0}, {False, self._adapters is not None}):
                self._run_forward(size, is_short=is_short, uses_lora=uses_lora)
            for is_filtered in (False, True):
                self._run_sampler(size, is_filtered=is_filtered)
            tell((place + 1) / len(sizes))

    def close(self) -> None:
        """Give back what the captured work holds."""
        self._replay.close()

    def _columns(self, size: int) -> Tensor:
        """The inputs of a size, [NUM_INPUTS, size] in one piece."""
        return self._inputs[: NUM_INPUTS * size].view(NUM_INPUTS, size)

    def _run_forward(self, size: int, *, is_short: bool, uses_lora: bool) -> None:
        longest = self._short if is_short else self._batch.shape.max_model_len
        self._replay(("forward", size, longest, uses_lora), lambda: self._forward(size, longest, uses_lora))

    def _run_sampler(
        self, size: int, *, is_filtered: bool, is_typical: bool = False, is_controlled: bool = False
    ) -> None:
        self._replay(
            ("sampler", size, is_filtered, is_controlled, is_typical),
            lambda: self._sample(size, is_filtered, is_typical, is_controlled),
        )

    def _forward(self, size: int, longest: int, uses_lora: bool) -> None:
        """The captured forward pass of `size` rows whose contexts hold at most `longest` tokens."""
        batch, block_size = self._batch, self._batch.shape.block_size
        rows, positions, fresh, _ = self._columns(size)
        columns = positions // block_size
        known = batch.tables[rows, columns]
        blocks = torch.where(fresh == NO_BLOCK, known, fresh)
        batch.tables[rows, columns] = blocks
        wide = positions.long()
        meta = AttentionMetadata(
            query_start=self._query_start[: size + 1],
            seq_lens=positions + 1,
            block_tables=batch.tables[:, : -(-longest // block_size)].index_select(0, rows),
            slot_mapping=blocks.long() * block_size + wide % block_size,
            max_query_len=1,
            max_seq_len=longest,
            num_decode_rows=size,
            is_captured=True,
        )
        if self._adapters is not None:
            self._adapters.use_captured(rows if uses_lora else None)
        hidden = self._decoder.forward(
            batch.tokens[rows, positions], wide, self._caches, meta, self._attention
        )
        self._logits[:size] = self._decoder.logits(hidden)

    def _sample(self, size: int, is_filtered: bool, is_typical: bool, is_controlled: bool) -> None:
        """The captured sampler of `size` rows."""
        rows, positions, *_ = self._columns(size)
        self._batch.draw(
            self._logits[:size], rows, positions + 1, self._token_ids[:size], is_filtered=is_filtered,
            is_typical=is_typical, is_controlled=is_controlled,
        )  # fmt: skip


def captured_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Powers of two up to the first that holds all rows, or MAX_SIZE."""
    most = min(MAX_SIZE, 1 << (max_num_seqs - 1).bit_length())
    return tuple(1 << power for power in range(most.bit_length()))
