"""Change the logits of rows that ask for it, on the device: allowed tokens, biases, penalties, bans, in 4 launches.

A row's tables hold what it asks for, and a mark for each token id (``engine.kernels.penalties``) that says how often the
token is in its text. The first launch counts the row's newest token; doing it twice counts it once, so that a captured step
may be run again. What must come before what is a launch of its own: all logits, then those with a bias, then bans.

Rows that ask for nothing are copied. Logits themselves stay as they are: log-probabilities are theirs.

Boundary: logits and tables in, logits out. Who fills the tables is ``engine.runner.device_controls``'s.
Shapes: n rows to choose for, R rows of tables, V vocabulary, B biases and N bans at most in a row.
"""

# Triton reads kernel parameters by name and compiles the body; their types exist only at launch.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels import penalties
from engine.kernels.sampling_filters import parts_of

WARPS = 4
BLOCK = 128  # biases, or bans, looked at side by side
# A ban's words: its token, the position from which on it does not count, the length of its prefix, the prefix.
UNTIL, LENGTH, PREFIX = 1, 2, 3

# Kernels read globals of this type only.
_ONE = tl.constexpr(penalties.ONE_OUTPUT)
_FULL = tl.constexpr(penalties.FULL)
_UNTIL = tl.constexpr(UNTIL)
_LENGTH = tl.constexpr(LENGTH)
_PREFIX = tl.constexpr(PREFIX)


@dataclass(frozen=True, slots=True)
class ControlTables:
    """What each of R rows asks for; device tensors. All zeros but a `repetition` of 1: nothing."""

    repetition: Tensor  # [R] float32
    frequency: Tensor  # [R] float32
    presence: Tensor  # [R] float32
    counts_tokens: Tensor  # [R] int32: whether it has penalties, and its marks are kept
    is_limited: Tensor  # [R] int32: whether only tokens in `allowed` may come
    num_biases: Tensor  # [R] int32
    num_bans: Tensor  # [R] int32
    num_prompt: Tensor  # [R] int32: tokens in front of its output
    marked: Tensor  # [R] int32: tokens of its text that its marks count
    marks: Tensor  # [R, V] int16
    allowed: Tensor  # [R, ceil(V / 32)] int32: bit ``j % 32`` of word ``j // 32`` is token j's
    bias_ids: Tensor  # [R, B] int32, each once
    biases: Tensor  # [R, B] float32
    bans: Tensor  # [R, N, words] int32


@triton.jit
def _changed(x, ids, inside, row, marks, allowed, repetition, frequency, presence, counts_tokens, is_limited,
             stride_marks, stride_allowed):  # fmt: skip
    """Logits x of token ids, their bias added, under the row's penalties; -inf where they are not allowed."""
    if tl.load(counts_tokens + row) != 0:
        mark = tl.load(marks + row * stride_marks + ids, mask=inside, other=0).to(tl.int32)
        factor = tl.load(repetition + row) + tl.zeros_like(x)
        repeated = tl.where(x > 0.0, tl.div_rn(x, factor), x * factor)
        count = (mark >> 1).to(tl.float32)
        found = tl.where(mark != 0, repeated, x) - tl.load(frequency + row) * count
        x = tl.where(count > 0.0, found - tl.load(presence + row), found)
    if tl.load(is_limited + row) != 0:
        words = tl.load(allowed + row * stride_allowed + ids // 32, mask=inside, other=0)
        x = tl.where((words >> (ids % 32)) & 1 != 0, x, float("-inf"))
    return x


@triton.jit(do_not_specialize=["rows", "positions"])
def count_kernel(marks, marked, tokens, rows, positions, counts_tokens, stride_marks, stride_tokens):
    """Count the token before each position in its row's marks, if it is not counted yet. One program, of one warp, a row."""
    row = tl.load(rows + tl.program_id(0)).to(tl.int64)
    position = tl.load(positions + tl.program_id(0))
    if tl.load(counts_tokens + row) != 0:  # noqa: SIM102 - `marked` is read by rows that keep marks
        if tl.load(marked + row) < position:
            place = marks + row * stride_marks + tl.load(tokens + row * stride_tokens + position - 1)
            mark = tl.load(place).to(tl.int32)
            tl.store(place, tl.where(mark < _FULL, mark + _ONE, mark).to(tl.int16))
            tl.store(marked + row, position)


@triton.jit(do_not_specialize=["rows"])
def change_kernel(
    out, logits, rows, marks, allowed, repetition, frequency, presence, counts_tokens, is_limited, vocab,
    stride_out, stride_logits, stride_marks, stride_allowed, TILE: tl.constexpr,
):  # fmt: skip
    """Every logit under its row's penalties and limits. Axes: (row, part)."""
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + i).to(tl.int64)
    ids = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = ids < vocab
    x = tl.load(logits + i * stride_logits + ids, mask=inside, other=0.0)
    x = _changed(x, ids, inside, row, marks, allowed, repetition, frequency, presence, counts_tokens, is_limited,
                 stride_marks, stride_allowed)  # fmt: skip
    tl.store(out + i * stride_out + ids, x, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def bias_kernel(
    out, logits, rows, bias_ids, biases, num_biases, marks, allowed, repetition, frequency, presence, counts_tokens,
    is_limited, stride_out, stride_logits, stride_biases, stride_marks, stride_allowed, BLOCK: tl.constexpr,
):  # fmt: skip
    """The logits that have a bias, from the beginning. One program a row."""
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + i).to(tl.int64)
    number = tl.load(num_biases + row)
    for first in range(0, number, BLOCK):
        places = first + tl.arange(0, BLOCK)
        inside = places < number
        ids = tl.load(bias_ids + row * stride_biases + places, mask=inside, other=0)
        x = tl.load(logits + i * stride_logits + ids, mask=inside, other=0.0)
        x += tl.load(biases + row * stride_biases + places, mask=inside, other=0.0)
        x = _changed(x, ids, inside, row, marks, allowed, repetition, frequency, presence, counts_tokens, is_limited,
                     stride_marks, stride_allowed)  # fmt: skip
        tl.store(out + i * stride_out + ids, x, mask=inside)


@triton.jit(do_not_specialize=["rows", "positions"])
def ban_kernel(
    out, rows, positions, tokens, bans, num_bans, num_prompt, stride_out, stride_tokens, stride_row, stride_ban,
    WORDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """-inf for each token whose ban counts at the row's position, behind the row's newest output. One program a row."""
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + i).to(tl.int64)
    position = tl.load(positions + i)
    number = tl.load(num_bans + row)
    start = tl.load(num_prompt + row)
    for first in range(0, number, BLOCK):
        places = first + tl.arange(0, BLOCK)
        inside = places < number
        ban = bans + row * stride_row + places * stride_ban
        length = tl.load(ban + _LENGTH, mask=inside, other=0)
        behind = position - length  # where the prefix has to begin
        counts = inside & (position < tl.load(ban + _UNTIL, mask=inside, other=0)) & (behind >= start)
        for j in range(WORDS - _PREFIX):
            asked = counts & (j < length)
            expected = tl.load(ban + _PREFIX + j, mask=asked, other=0)
            counts = counts & (
                expected == tl.load(tokens + row * stride_tokens + behind + j, mask=asked, other=0)
            )
        tl.store(out + i * stride_out + tl.load(ban, mask=counts, other=0), float("-inf"), mask=counts)


def control_logits(
    logits: Tensor, rows: Tensor, positions: Tensor, tokens: Tensor, tables: ControlTables
) -> Tensor:
    """Float32 logits [n, V] as the rows `rows` [n] ask for them at `positions` [n] (int32, of the tokens to be chosen).

    `tokens` [R, length] int32 are the rows' texts. The tables' marks take in each row's token before its position.
    """
    _check(logits, rows, positions, tokens, tables)
    n, vocab = logits.shape
    out = torch.empty_like(logits)
    if n == 0:
        return out
    tile, parts = parts_of(vocab)
    t = tables
    limits = (t.marks, t.allowed, t.repetition, t.frequency, t.presence, t.counts_tokens, t.is_limited)
    strides = (t.marks.stride(0), t.allowed.stride(0))
    count_kernel[(n,)](
        t.marks, t.marked, tokens, rows, positions, t.counts_tokens, t.marks.stride(0), tokens.stride(0), num_warps=1
    )  # fmt: skip
    change_kernel[(n, parts)](
        out, logits, rows, *limits, vocab, out.stride(0), logits.stride(0), *strides, TILE=tile, num_warps=WARPS
    )  # fmt: skip
    bias_kernel[(n,)](
        out, logits, rows, t.bias_ids, t.biases, t.num_biases, *limits, out.stride(0), logits.stride(0),
        t.biases.stride(0), *strides, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    ban_kernel[(n,)](
        out, rows, positions, tokens, t.bans, t.num_bans, t.num_prompt, out.stride(0), tokens.stride(0),
        t.bans.stride(0), t.bans.stride(1), WORDS=t.bans.shape[2], BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return out


def control_logits_ref(
    logits: Tensor, rows: Tensor, positions: Tensor, tokens: Tensor, tables: ControlTables
) -> Tensor:
    """The same in torch, on any device: static shapes, and no value goes to the host."""
    _check(logits, rows, positions, tokens, tables)
    t, index, at = tables, rows.long(), positions.long()
    ids = torch.arange(logits.shape[1], device=logits.device)
    newest = tokens[index, at - 1].long()
    mark = t.marks[index, newest]
    is_new = (t.counts_tokens[index] != 0) & (t.marked[index] < positions) & (mark < penalties.FULL)
    t.marks[index, newest] = torch.where(is_new, mark + penalties.ONE_OUTPUT, mark)
    t.marked[index] = torch.maximum(t.marked[index], positions)

    width = torch.arange(t.biases.shape[1], device=logits.device)
    biases = torch.where(width < t.num_biases[index][:, None], t.biases[index], 0.0)
    x = logits + torch.zeros_like(logits).scatter_add_(1, t.bias_ids[index].long(), biases)
    factors = (column[index][:, None] for column in (t.repetition, t.frequency, t.presence))
    changed = penalties.penalized(x, t.marks[index], *factors)
    x = torch.where((t.counts_tokens[index] != 0)[:, None], changed, x)
    is_allowed = (t.allowed[index][:, ids // 32] >> (ids % 32)) & 1 != 0
    x = torch.where(is_allowed | (t.is_limited[index] == 0)[:, None], x, float("-inf"))

    bans = t.bans[index]
    behind = at[:, None] - bans[:, :, LENGTH]
    number = torch.arange(bans.shape[1], device=logits.device)
    counts = (number < t.num_bans[index][:, None]) & (positions[:, None] < bans[:, :, UNTIL])
    counts &= behind >= t.num_prompt[index][:, None]
    for j in range(bans.shape[2] - PREFIX):
        found = tokens[index[:, None], (behind + j).clamp(0, tokens.shape[1] - 1)]
        counts &= (found == bans[:, :, PREFIX + j]) | (j >= bans[:, :, LENGTH])
    hits = torch.zeros_like(logits, dtype=torch.int32).scatter_add_(1, bans[:, :, 0].long(), counts.int())
    return torch.where(hits > 0, float("-inf"), x)


def _check(logits: Tensor, rows: Tensor, positions: Tensor, tokens: Tensor, tables: ControlTables) -> None:
    n, vocab = logits.shape
    assert logits.dtype == torch.float32, logits.dtype
    for tensor in (rows, positions):
        assert (tensor.dtype, tensor.shape) == (torch.int32, (n,)), (tensor.dtype, tensor.shape, n)
        assert tensor.is_contiguous()
    assert (tokens.dtype, tables.marks.dtype, tables.marks.shape[1]) == (torch.int32, torch.int16, vocab)
    for tensor in (logits, tokens, tables.marks, tables.allowed, tables.bias_ids, tables.biases, tables.bans):
        assert tensor.stride(-1) == 1, tensor.stride()
    assert tables.bias_ids.stride() == tables.biases.stride(), "one stride serves both"
