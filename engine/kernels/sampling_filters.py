"""What min_p, top_k, top_p and typical_p keep of a row, found without sorting it: a search over the integers that order its floats.

A float's *key* is an unsigned integer of the same order. top_k asks for the largest key t with at least k tokens at or
above it, top_p for the largest t with at least top_p of the probability at or above it. Both are found digit by digit, 4 bits
a pass, high bits first: a pass adds up what lies in the range found so far at or above each of its 16 digits, the next one
chooses the largest digit that still reaches the target. Probabilities are added as integers (2^40 is the most likely
token), so a sum has one value whatever the order of its parts, and a row keeps the same tokens whatever is beside it.

typical_p comes last, of what the others keep. A token's distance from the entropy, ``|-log p - H|``, is ``|d - mean d|`` with d
the difference to the row's peak, since the normaliser cancels. One launch adds up masses and masses times d, as integers; then
the same search, over the keys of negated distances, finds the distance at which the probability is reached. All tokens at that
distance stay.

A row's tokens are cut into parts of at most TILE, one program each; sums go to the row's workspace by atomic integer additions. A
part with nothing in the range ends at once, here and in all further passes. The number of launches never depends on data.

Boundary: Triton functions and the layout of their workspace, and the same in torch (`keep_ref`). `engine.kernels.sampling` launches.
"""

# Triton reads kernel parameters by name and compiles the body; their types exist only at launch.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.gumbel import MIN_TEMPERATURE

TILE = 1024  # the most tokens of a part; 128k tokens are 126 parts, about as many as a large GPU has multiprocessors
DIGIT_BITS = 4
NUM_DIGITS = 32 // DIGIT_BITS
ONE = 2.0**40  # the integer mass of the most likely token; sums of 2^22 tokens fit 63 bits


def parts_of(vocab: int) -> tuple[int, int]:
    """Tokens of a part, a power of two, and how many parts a row has."""
    tile = max(128, min(TILE, int(triton.next_power_of_2(vocab))))
    return tile, -(-vocab // tile)


# Kernels read globals of this type only.
_BITS = tl.constexpr(DIGIT_BITS)
_BASE = tl.constexpr(1 << DIGIT_BITS)
_GROUP = tl.constexpr(4)  # digits summed at once; 16 sums of 64 bits a token would not fit the registers
_ONE = tl.constexpr(ONE)
_COOLEST = tl.constexpr(MIN_TEMPERATURE)
_HIGHEST = tl.constexpr(torch.finfo(torch.float32).max)

# A row's workspace, int64, zero at first: the key of its largest value, the lowest key that min_p and top_k keep, and a
# slot for each pass: 16 sums, the lowest key of the pass's range, the weight above the range. top_p has one pass more:
# its range is a single key, and what counts are the tokens in it.
_PEAK = tl.constexpr(0)
_FLOOR = tl.constexpr(1)
_HEADER = tl.constexpr(2)
_LOW = tl.constexpr(_BASE)
_ABOVE = tl.constexpr(_BASE + 1)
_SLOT = tl.constexpr(_BASE + 2)
_BY_MASS_SLOTS = tl.constexpr(_HEADER + NUM_DIGITS * _SLOT)
_LAST = tl.constexpr(NUM_DIGITS - 1)
_ROW_WORDS = tl.constexpr(_BY_MASS_SLOTS + (NUM_DIGITS + 1) * _SLOT)
ROW_WORDS = int(_ROW_WORDS.value)
# And for typical_p: the mass of what the others keep, its sum of mass times d, and a slot for each pass.
_MASS = tl.constexpr(0)
_MOMENT = tl.constexpr(1)
_TYPICAL_WORDS = tl.constexpr(_HEADER + NUM_DIGITS * _SLOT)
TYPICAL_WORDS = int(_TYPICAL_WORDS.value)


@triton.jit
def load_scaled(logits, mask, ids, vocab, temperature, HAS_MASK: tl.constexpr):
    """Logits of the row's tokens over their temperature (0: as they are), and which may be chosen at all.

    What may not be chosen, and not-a-number, is -inf.
    """
    allowed = ids < vocab
    x = tl.load(logits + ids, mask=allowed, other=float("-inf"))
    if HAS_MASK:
        words = tl.load(mask + ids // 32, mask=allowed, other=0)
        allowed = allowed & ((words >> (ids % 32)) & 1 != 0)
    x = tl.where(allowed & (x == x), x, float("-inf"))
    if temperature > 0.0:
        x = tl.div_rn(x, tl.maximum(temperature, _COOLEST) + tl.zeros_like(x))
    return x, allowed


@triton.jit
def key_of(x):
    """An unsigned integer that orders as the float x does; both zeros have the same one."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit
def value_of(key):
    """The float of a key; keys that no number has (0: no token at all) count as that of -inf."""
    key = tl.maximum(key.to(tl.uint32), 0x007FFFFF)
    return tl.where(key >> 31 != 0, key ^ 0x80000000, key ^ 0xFFFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def _mass_of(x, peak):
    """The integer mass of a value; at an infinite peak only what equals it has any."""
    finite = tl.where(tl.abs(peak) == float("inf"), _HIGHEST, peak)
    return (tl.exp(tl.where(x == peak, 0.0, x - finite)) * _ONE).to(tl.int64)


@triton.jit
def _descend(slot, target, index):
    """Where pass `index` leads: the lowest key of the next range, and the weight above that range."""
    digits = tl.arange(0, _BASE)
    sums = tl.load(slot + digits)
    above = tl.load(slot + _ABOVE)
    digit = tl.maximum(tl.sum((above + sums >= target).to(tl.int32), 0) - 1, 0)
    low = tl.load(slot + _LOW) + (digit.to(tl.int64) << (index - _LAST) * -_BITS)
    return low, above + tl.sum(tl.where(digits == digit + 1, sums, 0), 0)


@triton.jit
def _mass_target(slots, top_p):
    """The integer mass that top_p of the row's whole mass means."""
    share = top_p.to(tl.float64) * tl.load(slots).to(tl.float64)
    return tl.maximum(tl.ceil(share).to(tl.int64), 1)


@triton.jit(do_not_specialize=["rows", "index"])
def narrow_kernel(
    work, counts, logits, rows, temperature, top_k, top_p, min_p, mask, vocab, stride_logits, stride_mask, index,
    FIRST: tl.constexpr, BY_MASS: tl.constexpr, HAS_MASK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Pass `index` of the search for top_k, or BY_MASS of that for top_p. Axes: (row, part). FIRST: index is 0.

    ``counts[row, part]`` is the number of the part's tokens in the range. The first pass of all also finds the peak.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    setting = tl.load(rows + row)
    heat = tl.load(temperature + setting)
    if heat <= 0.0:
        return
    header = work + row * _ROW_WORDS
    count = counts + row * tl.num_programs(1) + part
    k = tl.load(top_k + setting)
    if BY_MASS:
        p = tl.load(top_p + setting)
        slots = header + _BY_MASS_SLOTS
        is_wanted = p < 1.0
        peak = value_of(tl.load(header + _PEAK))
        if FIRST:
            # Rows without top_k have empty slots, which lead to key 0.
            floor, _ = _descend(header + _HEADER + _LAST * _SLOT, tl.maximum(k, 1).to(tl.int64), _LAST)
            least = tl.load(min_p + setting)
            if least > 0.0:
                floor = tl.maximum(floor, key_of(peak + tl.log(least)).to(tl.int64))
            if part == 0:
                tl.store(header + _FLOOR, floor)
        else:
            floor = tl.load(header + _FLOOR)
            target = _mass_target(slots, p)
    else:
        slots = header + _HEADER
        is_wanted = (k > 0) & (k < vocab)
        target = k.to(tl.int64)
    if BY_MASS or not FIRST:  # noqa: SIM102 - known when compiling, the inner one is not
        if not is_wanted:
            return
    slot = slots + index * _SLOT
    low = tl.zeros([], tl.int64)
    if not FIRST:
        is_empty = tl.load(count) == 0  # and so is every smaller range
        if is_empty & (part > 0):
            return
        low, above = _descend(slot - _SLOT, target, index - 1)
        if part == 0:
            tl.store(slot + _LOW, low)
            tl.store(slot + _ABOVE, above)
        if is_empty:
            return

    ids = part * TILE + tl.arange(0, TILE)
    x, allowed = load_scaled(
        logits + row * stride_logits, mask + row * stride_mask, ids, vocab, heat, HAS_MASK
    )
    key = key_of(x)
    if FIRST and not BY_MASS:
        tl.atomic_max(header + _PEAK, tl.max(tl.where(allowed, key, 0), 0).to(tl.int64), sem="relaxed")
        if not is_wanted:
            return
    inside = allowed & (
        (key ^ low.to(tl.uint32)) <= (0xFFFFFFFF >> (index * _BITS).to(tl.int64)).to(tl.uint32)
    )
    if BY_MASS:
        inside = inside & (key >= floor.to(tl.uint32))
    number = tl.sum(inside.to(tl.int32), 0)
    tl.store(count, number)
    if number == 0:
        return
    shift = tl.maximum((index - _LAST) * -_BITS, 0).to(tl.uint32)
    digit = (key >> shift).to(tl.int32) & (_BASE - 1)
    if BY_MASS:
        weight = tl.where(inside, _mass_of(x, peak), 0)
    else:
        weight = inside.to(tl.int32)
    for first in tl.static_range(0, _BASE, _GROUP):
        digits = first + tl.arange(0, _GROUP)
        sums = tl.sum(tl.where(digit[:, None] >= digits[None, :], weight[:, None], 0), 0).to(tl.int64)
        tl.atomic_add(slot + digits, sums, mask=sums > 0, sem="relaxed")


@triton.jit
def kept(x, allowed, work, counts, row, part, p, PARTS: tl.constexpr):
    """Which of the part's tokens the row's filters keep, once all passes are done. PARTS: a power of two, no less than parts."""
    header = work + row * _ROW_WORDS
    key = key_of(x)
    keep = allowed & (key >= tl.load(header + _FLOOR).to(tl.uint32))
    if p < 1.0:
        slots = header + _BY_MASS_SLOTS
        low = tl.load(slots + (_LAST + 1) * _SLOT + _LOW)
        left = _mass_target(slots, p) - tl.load(slots + (_LAST + 1) * _SLOT + _ABOVE)
        # Of the tokens at the last key the lowest ids stay: as many as are needed to reach the target.
        mass = _mass_of(value_of(low), value_of(tl.load(header + _PEAK)))
        others = tl.arange(0, PARTS)
        before = tl.sum(tl.load(counts + row * tl.num_programs(1) + others, mask=others < part, other=0), 0)
        is_last = keep & (key == low.to(tl.uint32))
        place = before + tl.cumsum(is_last.to(tl.int32), 0) - 1
        keep = keep & (key >= low.to(tl.uint32)) & (~is_last | (place * mass < left))
    return keep


@triton.jit
def _below(x, peak):
    """How far values lie below the peak, which may be infinite."""
    finite = tl.where(tl.abs(peak) == float("inf"), _HIGHEST, peak)
    return tl.where(x == peak, 0.0, finite - x)


@triton.jit
def _distance_key(x, peak, typical):
    """Keys of negated distances from the mean: the nearest token has the largest one."""
    # Not in float64, whose division is a call with a stack of its own.
    mass = tl.maximum(tl.load(typical + _MASS), 1).to(tl.float32)
    mean = tl.div_rn(tl.load(typical + _MOMENT).to(tl.float32), mass)
    return key_of(-tl.abs(_below(x, peak) - mean))


@triton.jit
def _typical_floor(typical, typical_p):
    """The lowest key of a negated distance that typical_p keeps, once all passes are done."""
    floor, _ = _descend(typical + _HEADER + _LAST * _SLOT, _mass_target(typical, typical_p), _LAST)
    return floor


@triton.jit(do_not_specialize=["rows", "index"])
def typical_kernel(
    typical, work, counts, logits, rows, temperature, top_p, typical_p, mask, vocab, stride_logits, stride_mask, index,
    FIRST: tl.constexpr, HAS_MASK: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """FIRST: mass and moment of what the row's other filters keep; then pass `index` of the search. Axes: (row, part)."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    setting = tl.load(rows + row)
    heat = tl.load(temperature + setting)
    share = tl.load(typical_p + setting)
    if (heat <= 0.0) | (share >= 1.0):
        return
    typical += row * _TYPICAL_WORDS
    ids = part * TILE + tl.arange(0, TILE)
    x, allowed = load_scaled(
        logits + row * stride_logits, mask + row * stride_mask, ids, vocab, heat, HAS_MASK
    )
    inside = kept(x, allowed, work, counts, row, part, tl.load(top_p + setting), PARTS)
    peak = value_of(tl.load(work + row * _ROW_WORDS + _PEAK))
    mass = tl.where(inside, _mass_of(x, peak), 0)
    if FIRST:
        below = tl.where(mass > 0, _below(x, peak), 0.0)
        moment = (tl.exp(-below) * below * _ONE).to(tl.int64)
        tl.atomic_add(typical + _MASS, tl.sum(mass, 0), sem="relaxed")
        tl.atomic_add(typical + _MOMENT, tl.sum(tl.where(mass > 0, moment, 0), 0), sem="relaxed")
    else:
        slot = typical + _HEADER + index * _SLOT
        low = tl.zeros([], tl.int64)
        if index > 0:
            low, above = _descend(slot - _SLOT, _mass_target(typical, share), index - 1)
            if part == 0:
                tl.store(slot + _LOW, low)
                tl.store(slot + _ABOVE, above)
        key = _distance_key(x, peak, typical)
        inside = inside & (
            (key ^ low.to(tl.uint32)) <= (0xFFFFFFFF >> (index * _BITS).to(tl.int64)).to(tl.uint32)
        )
        shift = tl.maximum((index - _LAST) * -_BITS, 0).to(tl.uint32)
        digit = (key >> shift).to(tl.int32) & (_BASE - 1)
        weight = tl.where(inside, mass, 0)
        for first in tl.static_range(0, _BASE, _GROUP):
            digits = first + tl.arange(0, _GROUP)
            sums = tl.sum(tl.where(digit[:, None] >= digits[None, :], weight[:, None], 0), 0)
            tl.atomic_add(slot + digits, sums, mask=sums > 0, sem="relaxed")


@triton.jit
def kept_typical(x, keep, typical, work, row, share):
    """Which of the part's tokens, of those that the other filters keep, typical_p keeps."""
    if share < 1.0:
        typical += row * _TYPICAL_WORDS
        peak = value_of(tl.load(work + row * _ROW_WORDS + _PEAK))
        keep = keep & (_distance_key(x, peak, typical) >= _typical_floor(typical, share).to(tl.uint32))
    return keep


def keep_ref(
    scaled: Tensor, allowed: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, typical_p: Tensor | None
) -> Tensor:
    """The same in torch by sorting: which of scaled logits [n, V] the rows' filters [n] keep. No value leaves the device."""
    vocab = scaled.shape[1]
    values, order = scaled.sort(dim=-1, descending=True, stable=True)
    peak = values[:, :1]
    nothing = torch.full_like(peak, float("-inf"))
    floor = torch.where(min_p[:, None] > 0.0, peak + min_p[:, None].log(), nothing)
    k = top_k[:, None].long()
    kth = values.gather(1, (k - 1).clamp(0, vocab - 1))
    floor = torch.maximum(floor, torch.where((k > 0) & (k < vocab), kth, nothing))
    finite = torch.where(peak.isinf(), torch.finfo(torch.float32).max, peak)
    mass = (torch.where(values == peak, 0.0, values - finite).exp() * ONE).long()
    mass = torch.where((values >= floor) & allowed.gather(1, order), mass, 0)
    target = (top_p[:, None].double() * mass.sum(dim=-1, keepdim=True).double()).ceil().long().clamp(min=1)
    beyond = (mass.cumsum(dim=-1) - mass >= target) & (top_p[:, None] < 1.0)
    keep = (scaled >= floor) & ~torch.empty_like(beyond).scatter_(1, order, beyond)
    if typical_p is None:
        return keep
    keep = keep & allowed
    below = torch.where(scaled == peak, 0.0, finite - scaled)
    mass = torch.where(keep, ((-below).exp() * ONE).long(), 0)
    moment = torch.where(mass > 0, ((-below).exp() * below * ONE).long(), 0)
    total = mass.sum(dim=-1, keepdim=True)
    mean = moment.sum(dim=-1, keepdim=True).float() / total.clamp(min=1).float()
    distance = torch.where(keep, (below - mean).abs(), float("inf"))
    nearest, order = distance.sort(dim=-1, stable=True)
    target = (typical_p[:, None].double() * total.double()).ceil().long().clamp(min=1)
    last = (mass.gather(1, order).cumsum(dim=-1) < target).sum(dim=-1, keepdim=True).clamp(max=vocab - 1)
    return keep & ((distance <= nearest.gather(1, last)) | (typical_p[:, None] >= 1.0))
