"""Choose one token per row from its logits.

Randomness is a hash of (seed, position, token id) and nothing else, so that a seed gives the same text whatever shares
the batch, across preemption, and on every device of the same arithmetic:

    mix(x)          x ^= x >> 16; x *= 0x7FEB352D; x ^= x >> 15; x *= 0x846CA68B; x ^= x >> 16      (32 bits, wrapping)
    key0            mix(mix(seed_low + 0x9E3779B9) ^ position)
    key1            mix(mix(seed_high ^ mix(seed_low + 0x9E3779B9)) ^ mix(position + 0x85EBCA6B))
    hash(token)     mix(mix(token ^ key0) + key1)
    gumbel(token)   -log(-log1p(-u)),  u = min((hash + 0.5) / 2^32, 1 - 2^-24)
    token           argmax(logits / temperature + gumbel) over the tokens that the filters keep, lowest id among equals

Small u are the likely winners, and small floats are finely spaced: that is why u and not 1 - u.
Source: mix is "lowbias32" (Wellons, hash-prospector, 2018); argmax of logits plus Gumbel noise samples the softmax
(Gumbel 1954; Maddison et al. 2014).

A row's edits (biases, penalties, banned tokens) come first. Then filters, in this order, as in vLLM: temperature, min_p,
top_k, top_p; last typical_p, as in transformers. Work that no row asks for is not done: a greedy batch is one argmax and a
look for NaN, rows are sorted only for top_p, and where few are kept only their most likely tokens. Log-probabilities are those
of the raw logits.

typical_p looks at what is left of a row, renormalised. A token's distance |-log p - entropy| is |value - mean value| there, since
the normaliser cancels; all tokens at the distance where the probability reaches typical_p stay.

Boundary: logits and settings in, tokens and log-probabilities out, on the host (`engine.kernels.sampling` is for devices);
no rows, no plan, no stop rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.kernels.gumbel import MIN_TEMPERATURE, gumbel_noise, mix_keys
from engine.kernels.penalties import penalized
from engine.plan import TokenLogprobs

NO_TOKEN = (
    -1
)  # what is chosen of a row whose logits hold NaN or +inf: a model or a device that computes no numbers
FEW = 256  # tokens looked at first where a filter keeps few: sorting and hashing them is cheap


@dataclass(frozen=True, slots=True)
class LogitEdits:
    """How one row's logits change before anything else: biases, then penalties by marks, then what must not come."""

    row: int  # which of the L rows
    bias: NDArray[np.float32] | None  # [V]; -inf: never
    marks: NDArray[np.int16] | None  # [V], as ``engine.kernels.penalties`` has them
    penalties: tuple[float, float, float] = (1.0, 0.0, 0.0)  # repetition, frequency, presence
    banned: tuple[int, ...] = ()  # token ids


@dataclass(frozen=True, slots=True)
class Masks:
    """Which tokens may come in k of the L rows, each with a word of bits for 32 tokens."""

    rows: NDArray[np.int64]  # [k], ascending
    bits: NDArray[
        np.int32
    ]  # [k, ceil(V / 32)]: bit j % 32 of word j // 32 is token j's, 0 where it must not come


@dataclass(frozen=True, slots=True)
class SampleSettings:
    """How each of L rows samples. Host arrays [L], so that deciding what to do costs no device wait."""

    temperature: NDArray[np.float64]
    top_k: NDArray[np.int64]  # 0: all
    top_p: NDArray[np.float64]
    min_p: NDArray[np.float64]
    typical_p: NDArray[np.float64]
    seed: NDArray[np.int64]
    position: NDArray[np.int64]  # of the token to be chosen
    num_logprobs: NDArray[np.int64]  # -1: none wanted; n: the chosen one and the n most likely
    edits: tuple[LogitEdits, ...] = ()  # of rows that ask for any
    masks: Masks | None = None  # of rows that follow a grammar


@dataclass(frozen=True, slots=True)
class Filters:
    """What n rows drop before they draw. Host arrays [n]."""

    top_k: NDArray[np.int64]
    top_p: NDArray[np.float64]
    min_p: NDArray[np.float64]
    typical_p: NDArray[np.float64]

    def of(self, rows: NDArray[np.int64]) -> Filters:
        """The filters of some of the rows."""
        return Filters(self.top_k[rows], self.top_p[rows], self.min_p[rows], self.typical_p[rows])

    def rows_that_keep_few(self, vocab_size: int) -> NDArray[np.int64]:
        """Rows whose kept tokens are probably among the FEW most likely ones."""
        if vocab_size <= 2 * FEW:
            return np.empty(0, dtype=np.int64)
        narrow = (self.top_k > 0) | (self.top_p < 1.0) | (self.min_p > 0.0)
        return np.nonzero(narrow & (self.top_k < FEW) & (self.typical_p >= 1.0))[0]


@dataclass(frozen=True, slots=True)
class LogprobTensors:
    """Log-probabilities of n positions, on the device or on the host."""

    token_ids: Tensor  # [n]
    chosen: Tensor  # [n]
    rank: Tensor  # [n]
    top_ids: Tensor  # [n, N]
    top_values: Tensor  # [n, N]
    logits: Tensor | None = None  # [n, V], on the host, where whole rows were asked for

    def fields(self) -> tuple[Tensor, ...]:
        """All of them but whole rows, in their order."""
        return self.token_ids, self.chosen, self.rank, self.top_ids, self.top_values

    def to_host(self) -> LogprobTensors:
        """Start one copy of them to the host (pinned); it is valid once the stream has passed this point."""
        return LogprobTensors(*_to_host(self.fields()))

    def entries(self, num_top: list[int]) -> list[TokenLogprobs]:
        """One entry per position with its first ``num_top[i]`` most likely tokens."""
        columns = zip(
            self.token_ids.tolist(), self.chosen.tolist(), self.rank.tolist(), self.top_ids.tolist(),
            self.top_values.tolist(), num_top, self._rows(), strict=True,
        )  # fmt: skip
        return [
            TokenLogprobs(token, logprob, rank, tuple(ids[:n]), tuple(values[:n]), row)
            for token, logprob, rank, ids, values, n, row in columns
        ]

    def _rows(self) -> Sequence[NDArray[np.float32] | None]:
        return [None] * len(self.token_ids) if self.logits is None else list(self.logits.numpy())


@dataclass(frozen=True, slots=True)
class Sampled:
    """`token_ids` [L]; `logprobs` of the rows that asked, in their order."""

    token_ids: Tensor
    logprobs: LogprobTensors | None
    logprob_rows: tuple[int, ...]

    def to_host(self) -> Sampled:
        """Start one copy of all of it to the host (pinned); it is valid once the stream has passed this point."""
        token_ids, *figures = _to_host((self.token_ids, *(self.logprobs.fields() if self.logprobs else ())))
        return Sampled(token_ids, LogprobTensors(*figures) if figures else None, self.logprob_rows)


def _to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors on the host, by one transfer that does not wait for the device; pieces of one copy also on a CPU."""
    order = sorted(
        range(len(tensors)), key=lambda i: -tensors[i].element_size()
    )  # so that each piece is aligned
    packed = torch.cat([tensors[i].contiguous().view(-1).view(torch.uint8) for i in order]).to(
        "cpu", non_blocking=True
    )
    pieces = torch.split(packed, [tensors[i].numel() * tensors[i].element_size() for i in order])
    found = {
        i: piece.view(tensors[i].dtype).view(tensors[i].shape) for i, piece in zip(order, pieces, strict=True)
    }
    return [found[i] for i in range(len(tensors))]


def noise_keys(seed: NDArray[np.int64], position: NDArray[np.int64]) -> Tensor:
    """The two 32-bit keys of each row, int32 [2, L] on the host."""
    low = torch.from_numpy(seed.astype(np.uint64).astype(np.uint32).view(np.int32))
    high = torch.from_numpy((seed.astype(np.uint64) >> np.uint64(32)).astype(np.uint32).view(np.int32))
    at = torch.from_numpy(position.astype(np.int32))
    return mix_keys(low, high, at)


def sample(logits: Tensor, settings: SampleSettings, *, invariant: bool = False) -> Sampled:
    """Choose a token for each row of logits [L, V] (float32 or float64, left as they are); NO_TOKEN where they are no numbers."""
    allowed = _masked(_edited(logits, settings.edits), settings.masks)
    drawn = np.nonzero(settings.temperature > 0.0)[0]
    if len(drawn) == len(logits):
        chosen = _draw(allowed, settings, drawn, invariant)
    else:
        chosen = allowed.argmax(dim=-1)
        if len(drawn):
            index = torch.from_numpy(drawn)
            chosen[index] = _draw(allowed[index], settings, drawn, invariant)
    chosen = torch.where((logits < float("inf")).all(dim=-1), chosen, NO_TOKEN)
    wanted = np.nonzero((settings.num_logprobs >= 0) & (chosen.numpy() != NO_TOKEN))[0]
    logprobs = None
    if len(wanted):
        index = torch.from_numpy(wanted)
        logprobs = token_logprobs(logits[index], chosen[index], int(settings.num_logprobs.max()))
    return Sampled(chosen, logprobs, tuple(wanted.tolist()))


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> LogprobTensors:
    """Log-probabilities of the given tokens [n] and of the `num_top` most likely ones under logits [n, V]."""
    logprobs = logits.log_softmax(dim=-1)
    chosen = logprobs.gather(1, token_ids[:, None].long())
    rank = (logprobs > chosen).sum(dim=-1) + 1
    top = logprobs.topk(min(num_top, logits.shape[1]), dim=-1)
    return LogprobTensors(token_ids, chosen[:, 0], rank, top.indices, top.values)


def _draw(logits: Tensor, settings: SampleSettings, rows: NDArray[np.int64], invariant: bool) -> Tensor:
    """Draw from logits [n, V], row i under the settings of ``rows[i]``."""
    temperature = np.maximum(settings.temperature[rows], MIN_TEMPERATURE)
    scaled = logits / torch.from_numpy(temperature)[:, None].to(logits.dtype)
    filters = Filters(settings.top_k, settings.top_p, settings.min_p, settings.typical_p).of(rows)
    keys = noise_keys(settings.seed[rows], settings.position[rows])
    chosen = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    left = np.arange(len(rows))
    few = filters.rows_that_keep_few(logits.shape[1])
    if len(few):
        index = torch.from_numpy(few)
        found, settled = _draw_among_few(scaled[index], filters.of(few), keys[:, index], invariant)
        chosen[index] = found
        left = np.setdiff1d(left, few[settled.numpy()])
    if len(left) == len(rows):
        return _draw_among_all(scaled, filters, keys, invariant)
    if len(left):
        index = torch.from_numpy(left)
        chosen[index] = _draw_among_all(scaled[index], filters.of(left), keys[:, index], invariant)
    return chosen


def _draw_among_all(scaled: Tensor, filters: Filters, keys: Tensor, invariant: bool) -> Tensor:
    token_ids = torch.arange(scaled.shape[1], dtype=torch.int32, device=scaled.device)
    kept = keep_likely(scaled, filters)
    return (kept + gumbel_noise(keys, token_ids, scaled.dtype, invariant=invariant)).argmax(dim=-1)


def _draw_among_few(scaled: Tensor, filters: Filters, keys: Tensor, invariant: bool) -> tuple[Tensor, Tensor]:
    """The same draw, looking only at the FEW most likely tokens; and for which rows [n] they hold all that is kept.

    Which rows are settled follows from each row alone, so that the others in the batch cannot change a draw.
    """
    best, ids = scaled.topk(FEW, dim=-1)
    with np.errstate(divide="ignore"):
        floor = best[:, :1] + torch.from_numpy(np.log(filters.min_p))[:, None].to(scaled.dtype)
    k = np.where(filters.top_k > 0, filters.top_k, FEW)
    kth = best.gather(1, torch.from_numpy(k - 1)[:, None])
    floor = torch.where(torch.from_numpy(filters.top_k > 0)[:, None], torch.maximum(floor, kth), floor)
    ids, by_id = ids.sort(dim=-1)
    values = best.gather(1, by_id)
    kept = values >= floor
    if (filters.top_p < 1.0).any():
        probabilities = scaled.masked_fill(scaled < floor, float("-inf")).softmax(dim=-1).gather(1, ids)
        kept &= ~_beyond_nucleus(values, probabilities, filters.top_p)
    # A dropped token that equals the last of the few may stand for kept ones outside of them.
    settled = best[:, -1] < values.masked_fill(~kept, float("inf")).amin(dim=-1)
    noise = gumbel_noise(keys, ids.int(), scaled.dtype, invariant=invariant)
    place = (values.masked_fill(~kept, float("-inf")) + noise).argmax(dim=-1)
    return ids.gather(1, place[:, None])[:, 0], settled


def keep_likely(scaled: Tensor, filters: Filters) -> Tensor:
    """Set to -inf what min_p, top_k, top_p and typical_p drop from the scaled logits [n, V]; tokens equal to the k-th stay."""
    vocab, top_k, top_p, min_p = scaled.shape[1], filters.top_k, filters.top_p, filters.min_p
    if (min_p > 0.0).any():
        with np.errstate(divide="ignore"):
            floor = torch.from_numpy(np.log(min_p))[:, None].to(scaled.dtype)
        scaled = scaled.masked_fill(scaled < scaled.amax(dim=-1, keepdim=True) + floor, float("-inf"))
    limited = (top_k > 0) & (top_k < vocab)
    if limited.any():
        k = np.where(limited, top_k, 1)
        best = scaled.topk(int(k.max()), dim=-1).values
        kth = best.gather(1, torch.from_numpy(k - 1)[:, None])
        unlimited = torch.from_numpy(~limited)[:, None]
        scaled = scaled.masked_fill((scaled < kth) & ~unlimited, float("-inf"))
    for keep, share in ((_keep_nucleus, top_p), (_keep_typical, filters.typical_p)):
        asking = np.nonzero(share < 1.0)[0]
        if len(asking) == len(scaled):
            scaled = keep(scaled, share)
        elif len(asking):
            index = torch.from_numpy(asking)
            scaled = scaled.index_copy(0, index, keep(scaled[index], share[asking]))
    return scaled


def _keep_nucleus(scaled: Tensor, top_p: NDArray[np.float64]) -> Tensor:
    """Keep the smallest set of most likely tokens whose probability reaches top_p; lower ids first among equals."""
    return scaled.masked_fill(_beyond_nucleus(scaled, scaled.softmax(dim=-1), top_p), float("-inf"))


def _keep_typical(scaled: Tensor, typical_p: NDArray[np.float64]) -> Tensor:
    """Keep the tokens nearest to their mean value, under their own probabilities, that reach typical_p together."""
    probabilities = scaled.softmax(dim=-1)
    below = torch.where(probabilities > 0.0, scaled.amax(dim=-1, keepdim=True) - scaled, 0.0)
    mean = (probabilities * below).sum(dim=-1, keepdim=True)
    distance = torch.where(scaled > float("-inf"), (below - mean).abs(), float("inf"))
    ordered, order = distance.sort(dim=-1, stable=True)
    share = torch.from_numpy(typical_p)[:, None].to(scaled.dtype)
    last = (probabilities.gather(1, order).cumsum(dim=-1) < share).sum(dim=-1, keepdim=True)
    reach = ordered.gather(1, last.clamp(max=scaled.shape[1] - 1))
    return scaled.masked_fill(distance > reach, float("-inf"))


def _beyond_nucleus(values: Tensor, probabilities: Tensor, top_p: NDArray[np.float64]) -> Tensor:
    """Which tokens [n, m], given in the order of their ids, lie behind a set of more likely ones that reaches top_p."""
    _, order = values.sort(dim=-1, descending=True, stable=True)
    ordered = probabilities.gather(1, order)
    drop = ordered.cumsum(dim=-1) - ordered >= torch.from_numpy(top_p)[:, None].to(values.dtype)
    drop[:, 0] = False
    return torch.empty_like(drop).scatter_(1, order, drop)


def _edited(logits: Tensor, edits: tuple[LogitEdits, ...]) -> Tensor:
    if not edits:
        return logits
    logits = logits.clone()
    for edit in edits:
        row = logits[edit.row]
        if edit.bias is not None:
            row += torch.from_numpy(edit.bias)
        if edit.marks is not None:
            scalars = torch.tensor(edit.penalties, dtype=row.dtype)
            row.copy_(penalized(row, torch.from_numpy(edit.marks), *scalars))
        row[list(edit.banned)] = float("-inf")
    return logits


def _masked(logits: Tensor, masks: Masks | None) -> Tensor:
    if masks is None:
        return logits
    is_allowed = np.unpackbits(masks.bits.view(np.uint8), axis=1, bitorder="little", count=logits.shape[1])
    index = torch.from_numpy(masks.rows)
    limited = logits[index].masked_fill(torch.from_numpy(is_allowed) == 0, float("-inf"))
    return logits.index_copy(0, index, limited)
