"""StepPlan, StepResult and the Runner protocol: the narrow waist between scheduler and model.

A plan is a struct of arrays and costs O(scheduled rows) to build, whatever the contexts' lengths. It carries deltas:
a row's prompt, block table and sampling state travel once, with its admission; later steps name only new blocks. It
carries no token ids: a runner keeps each row's tokens on its device, writes the token that a step samples there itself,
and so can run step N+1 before the host knows step N's tokens.

Boundary: no torch, no Sequence. Row order is result order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from engine.grammar import Grammar

Int32 = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class KVSpec:
    """The KV cache of one group of layers that share a block table.

    Layout of each layer's K and V tensor: ``[num_blocks, num_kv_heads, block_size, head_size]``, contiguous, so that one
    head's block is one run of ``block_size * head_size`` values. Kernels assert these strides. Scales of a quantized cache
    (``engine.kernels.kv_quantization``) lie beside it and count as its bytes.
    """

    num_layers: int
    num_kv_heads: int
    head_size: int
    block_size: int
    dtype_bytes: int
    sliding_window: int | None = None
    scale_bytes: int = 0  # beside each stored head of a token
    shared_scale_bytes: int = 0  # once, however many blocks there are

    @property
    def bytes_per_token(self) -> int:
        head_bytes = self.head_size * self.dtype_bytes + self.scale_bytes
        return 2 * self.num_layers * self.num_kv_heads * head_bytes

    @property
    def bytes_per_block(self) -> int:
        return self.bytes_per_token * self.block_size

    def pool_bytes(self, num_blocks: int) -> int:
        """All that a pool of so many blocks takes."""
        return num_blocks * self.bytes_per_block + self.shared_scale_bytes

    def num_blocks_in(self, num_bytes: int) -> int:
        """Whole blocks that fit in so much memory."""
        return num_bytes // self.bytes_per_block


@dataclass(frozen=True, slots=True)
class BlockCopies:
    """KV blocks that a step copies before it computes: first all of `out` to host memory, then all of `back` from it.

    A slot occurs in `out` once at most, so does a block in each; a slot may be written and read by one step.
    """

    out: Int32  # [n, 2]: device block, host slot
    back: Int32  # [n, 2]: host slot, device block


_NO_PAIRS = np.zeros((0, 2), np.int32)
_NO_PAIRS.flags.writeable = False
NO_COPIES = BlockCopies(_NO_PAIRS, _NO_PAIRS)  # the one object of all steps that copy nothing


@dataclass(frozen=True, slots=True)
class RowAdmission:
    """A sequence takes a row: everything the runner must know of it, sent once.

    `token_ids` are all tokens known now (the prompt and, after a preemption, the outputs so far); positions below
    `num_computed` are already in the blocks (prefix cache), or come with the step's copies.
    """

    row: int
    request_id: str
    token_ids: tuple[int, ...] | list[int]
    num_prompt_tokens: int
    num_computed: int
    block_ids: tuple[tuple[int, ...], ...]  # one table per KV group, including the blocks of this step
    params: SamplingParams
    seed: int
    lora_slot: int = -1  # the adapter slot that its tokens use; -1: none
    lora_id: int = 0  # the adapter that the slot must hold from this step on; 0: whatever it holds
    grammar: Grammar | None = None  # that its outputs follow from their first token on


class Choices(NamedTuple):
    """The tokens that a step chooses, L in all."""

    row_index: NDArray[np.intp]  # which of the S scheduled rows
    positions: NDArray[np.int64]  # of the chosen token in its row


_NO_TOKENS = np.zeros(0, np.int32)
_NO_TOKENS.flags.writeable = False


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """What the draft model computes before the step that it belongs to. D rows, those of one token first.

    Row ``rows[i]`` computes tokens at positions ``start[i] … start[i] + num_tokens[i] - 1``, all of them known, in the blocks
    of its table: the draft model has KV of its own there. Then it guesses `num_guesses[i]` tokens, the last of which it does
    not compute; a row without guesses only catches up.
    """

    rows: Int32  # [D]
    start: Int32  # [D]
    num_tokens: Int32  # [D]
    num_guesses: Int32  # [D]


@dataclass(frozen=True)  # no slots: `choices` is kept
class StepPlan:
    """What one step computes. S scheduled rows.

    Row ``rows[i]`` computes tokens at positions ``start[i] … start[i] + num_tokens[i] - 1``. `logit_rows` are the
    indices i whose last position is the sequence's last token, if it may have another: they sample one token, written by the
    runner at position ``start[i] + num_tokens[i]`` of that row. Order within a step: `finished`, `copies`, `admitted`,
    `new_block_ids`, compute.
    Rows that compute one token (decode) come first, rows that compute several (prefill, or guesses) after them.

    The last ``num_draft[i]`` tokens of a row are guesses, which come with the plan or, with `drafting`, from the draft model.
    Such a row chooses a token behind its last known one and behind each guess, all written by the runner; those behind the
    first wrong guess are of no use, and a later step computes their positions again.
    """

    step_id: int
    rows: Int32  # [S]
    start: Int32  # [S]
    num_tokens: Int32  # [S]
    num_draft: Int32  # [S] guesses among num_tokens
    logit_rows: Int32  # indices into the S rows, ascending
    # Per KV group: blocks appended to the table of rows[i] are block_ids[offsets[i]:offsets[i + 1]]. The blocks of a row
    # admitted in this very plan are in its admission, not here.
    new_block_offsets: tuple[Int32, ...]  # each [S + 1]
    new_block_ids: tuple[Int32, ...]
    admitted: tuple[RowAdmission, ...] = ()
    finished: tuple[int, ...] = ()  # rows given back before this step; their buffers may be reused
    copies: BlockCopies = NO_COPIES
    # All rows' guesses, one row after the other; none where the draft model makes them.
    draft_token_ids: Int32 = field(default_factory=lambda: _NO_TOKENS)
    drafting: DraftPlan | None = None

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    @property
    def total_tokens(self) -> int:
        return int(self.num_tokens.sum())

    @cached_property
    def choices(self) -> Choices:
        """Of each token that is chosen, its row and position, in the order of ``StepResult.token_ids``."""
        picked = self.logit_rows
        end = (self.start[picked] + self.num_tokens[picked]).astype(np.int64)
        if not len(self.draft_token_ids) and self.drafting is None:
            return Choices(picked.astype(np.intp), end)
        count = self.num_draft[picked] + 1
        last = np.cumsum(count)
        behind = np.repeat(last, count) - 1 - np.arange(last[-1])  # choices of the same row behind each
        return Choices(np.repeat(picked, count).astype(np.intp), np.repeat(end, count) - behind)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position: of the chosen token and of the most likely ones, best first."""

    token_id: int
    logprob: float
    rank: int  # 1 is the most likely token
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()
    # The whole row of logits [V], where ALL_LOGPROBS were asked for; in the logits' dtype, so that nothing is rounded twice.
    logits: NDArray[np.float32 | np.float64] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step chose, in the plan's order.

    `token_ids[j]` is the j-th of ``plan.choices``. `logprobs` maps j to its entry for rows that asked; `prompt_logprobs`
    maps the row index i to the log-probabilities of the tokens at positions ``start[i] + 1 … start[i] + num_tokens[i]``
    that are prompt tokens and not before logprob_start_len, for rows that asked. `pooled` maps i to what the step adds to the
    row's pooled vector (``engine.runner.pooled``). `dead_ends` maps j to the reason why no token
    was possible: its token is none, and negative where the row's logits were no numbers.
    """

    step_id: int
    token_ids: list[int]
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    dead_ends: dict[int, str] = field(default_factory=dict)
    guesses: dict[int, list[int]] = field(default_factory=dict)  # by row: what the draft model guessed
    pooled: dict[int, NDArray[np.float64]] = field(default_factory=dict)
    prepare_ms: float = 0.0
    forward_ms: float = 0.0
    sample_ms: float = 0.0
    graph_size: int = 0  # rows of the captured graph that ran; 0: none
    bytes_needed: int = 0  # weights and KV that the step must read
    flops_needed: int = 0
    weight_bytes: int = 0  # of bytes_needed; the others are of keys and values
    attention_flops: int = 0  # of flops_needed: with keys and values; the others are with weights


class Runner(Protocol):
    """The model on its device. Steps run in submission order on one stream."""

    @property
    def max_inflight(self) -> int:
        """Steps that may be submitted before the oldest is collected; 1 means that nothing overlaps."""
        ...

    def submit(self, plan: StepPlan) -> None:
        """Start a step without waiting for it."""
        ...

    def collect(self) -> StepResult:
        """Wait for the oldest submitted step. Raises what the step raised; the step then counts as collected."""
        ...

    def reset_rows(self) -> None:
        """Forget every row and every step in flight (after a failed step; the scheduler re-admits what goes on)."""
        ...

    def sleep(self, level: int) -> None:
        """Give weights and KV cache back, while no step is in flight: 1 keeps the weights in host memory, 2 does not."""
        ...

    def wake_up(self) -> None:
        """Be as before `sleep`, but for what the KV cache held. If it raises, the runner sleeps on."""
        ...

    def close(self) -> None:
        """Give the device's memory back. A second call does nothing."""
        ...
