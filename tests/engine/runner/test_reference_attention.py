"""The torch attention backend, oracle of the others, equals attention written out token by token."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.attention import reference
from engine.attention.interface import AttentionMetadata
from engine.attention.reference import ReferenceAttention

# (tokens before this step, tokens of this step) of each row; decode rows first
MIXES = {
    "decode": [(0, 1), (1, 1), (15, 1), (16, 1), (130, 1)],
    "prefill": [(0, 7), (0, 70), (33, 20)],
    "mixed": [(90, 1), (3, 1), (0, 40), (64, 2), (17, 31)],
    "one": [(0, 1)],
}
SHAPES = {"gqa": (6, 2, 16), "mha": (4, 4, 10), "mqa": (5, 1, 24)}


class Case:
    """A step with scattered blocks; free slots and undefined table entries hold poison."""

    def __init__(self, mix: str, shape: str, block_size: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(5)
        self.rows = MIXES[mix]
        self.heads, self.kv_heads, self.size = SHAPES[shape]
        lengths = [before + new for before, new in self.rows]
        needed = [-(-n // block_size) for n in lengths]
        num_blocks = sum(needed) + 3
        order = torch.randperm(num_blocks, generator=generator).tolist()
        tables = torch.full((len(self.rows), max(needed) + 2), -7, dtype=torch.int32)
        slots = []
        self.k_cache = torch.full(
            (num_blocks, self.kv_heads, block_size, self.size), float("nan"), dtype=dtype
        )
        self.v_cache = self.k_cache.clone()

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.keys = [random(n, self.kv_heads, self.size) for n in lengths]
        self.values = [random(n, self.kv_heads, self.size) for n in lengths]
        self.backend = ReferenceAttention()
        for row, (before, _) in enumerate(self.rows):
            blocks = [order.pop() for _ in range(needed[row])]
            tables[row, : len(blocks)] = torch.tensor(blocks)
            places = torch.tensor(
                [blocks[p // block_size] * block_size + p % block_size for p in range(lengths[row])]
            )
            self.backend.store_kv(
                self.keys[row][:before],
                self.values[row][:before],
                self.k_cache,
                self.v_cache,
                places[:before],
            )
            slots.append(places[before:])
        self.new_keys = torch.cat([k[before:] for k, (before, _) in zip(self.keys, self.rows, strict=True)])
        self.new_values = torch.cat(
            [v[before:] for v, (before, _) in zip(self.values, self.rows, strict=True)]
        )
        self.q = random(sum(new for _, new in self.rows), self.heads, self.size)
        starts = torch.tensor([0, *(new for _, new in self.rows)]).cumsum(0)
        self.meta = AttentionMetadata(
            query_start=starts.int(),
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            block_tables=tables,
            slot_mapping=torch.cat(slots),
            max_query_len=max(new for _, new in self.rows),
            max_seq_len=max(lengths),
            num_decode_rows=sum(1 for _, new in self.rows if new == 1),
        )

    def run(self, backend: ReferenceAttention, window: int | None, **form: Any) -> Tensor:
        backend.store_kv(self.new_keys, self.new_values, self.k_cache, self.v_cache, self.meta.slot_mapping)
        return backend.forward(
            self.q, self.k_cache, self.v_cache, self.meta, scale=0.3, sliding_window=window, **form
        )

    def expected(
        self, window: int | None, softcap: float | None = None, alibi_slopes: Tensor | None = None
    ) -> Tensor:
        """One token, one head at a time, in float64."""
        found, at = torch.empty(self.q.shape, dtype=torch.float64), 0
        for row, (before, new) in enumerate(self.rows):
            for position in range(before, before + new):
                first = 0 if window is None else max(0, position - window + 1)
                for head in range(self.heads):
                    kv_head = head // (self.heads // self.kv_heads)
                    keys = self.keys[row][first : position + 1, kv_head].double()
                    scores = [0.3 * float(self.q[at, head].double() @ key) for key in keys]
                    if softcap is not None:
                        scores = [softcap * math.tanh(s / softcap) for s in scores]
                    if alibi_slopes is not None:
                        slope = float(alibi_slopes[head])
                        scores = [s + slope * (first + i - position) for i, s in enumerate(scores)]
                    weights = torch.tensor([math.exp(s - max(scores)) for s in scores], dtype=torch.float64)
                    values = self.values[row][first : position + 1, kv_head].double()
                    found[at, head] = (weights / weights.sum()) @ values
                at += 1
        return found


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("window", [None, 1, 9, 64])
@pytest.mark.parametrize("mix", list(MIXES))
def test_equals_attention_written_out(mix: str, window: int | None, deterministic: bool) -> None:
    shape = {"decode": "gqa", "prefill": "mqa", "mixed": "gqa", "one": "mha"}[mix]
    case = Case(mix, shape, block_size=8, dtype=torch.float64)
    found = case.run(ReferenceAttention(deterministic=deterministic), window)
    torch.testing.assert_close(found, case.expected(window), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("window", [None, 9])
def test_soft_cap_and_alibi_equal_their_definitions(window: int | None, deterministic: bool) -> None:
    case = Case("mixed", "gqa", block_size=8, dtype=torch.float64)
    slopes = torch.tensor([2.0**-i for i in range(1, case.heads + 1)])
    backend = ReferenceAttention(deterministic=deterministic)
    for form in ({"softcap": 0.7}, {"alibi_slopes": slopes}, {"softcap": 0.7, "alibi_slopes": slopes}):
        want = case.expected(window, **form)
        torch.testing.assert_close(case.run(backend, window, **form), want, rtol=1e-12, atol=1e-12)
        assert (want - case.expected(window)).abs().max() > 0.1, "the form makes no difference here"


@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("block_size", [1, 16, 64])
def test_shapes_and_block_sizes(shape: str, block_size: int) -> None:
    case = Case("mixed", shape, block_size, torch.float64)
    torch.testing.assert_close(case.run(ReferenceAttention(), 20), case.expected(20), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "margin"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)]
)
def test_narrow_types_sum_in_float32(dtype: torch.dtype, margin: float) -> None:
    case = Case("mixed", "gqa", 16, dtype)
    found = case.run(ReferenceAttention(), None)
    assert found.dtype == dtype
    assert (found.double() - case.expected(None)).abs().max() < margin


def test_long_rows_are_cut_to_a_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("mixed", "gqa", 8, torch.float64)
    whole = case.run(ReferenceAttention(), None)
    monkeypatch.setattr(reference, "MAX_GATHERED_VALUES", 500)
    torch.testing.assert_close(case.run(ReferenceAttention(), None), whole, rtol=1e-12, atol=1e-12)


def test_a_given_output_is_filled() -> None:
    case = Case("mixed", "gqa", 8, torch.float64)
    out = torch.empty_like(case.q)
    expected = case.run(ReferenceAttention(), None)
    found = ReferenceAttention().forward(case.q, case.k_cache, case.v_cache, case.meta, scale=0.3, out=out)
    assert found is out
    assert torch.equal(out, expected)


def test_store_writes_its_slots_and_no_others() -> None:
    cache = torch.zeros(4, 2, 8, 3)
    other = torch.zeros_like(cache)
    k, v = torch.rand(3, 2, 3) + 1, torch.rand(3, 2, 3) + 1
    ReferenceAttention().store_kv(k, v, cache, other, torch.tensor([31, 0, 9]))
    for token, (block, offset) in enumerate([(3, 7), (0, 0), (1, 1)]):
        assert torch.equal(cache[block, :, offset], k[token])
        assert torch.equal(other[block, :, offset], v[token])
    assert int((cache != 0).sum()) == k.numel()


def test_another_cache_layout_is_refused() -> None:
    cache = torch.zeros(4, 8, 2, 3).transpose(1, 2)
    with pytest.raises(AssertionError, match="HND"):
        ReferenceAttention().store_kv(
            torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), cache, cache, torch.tensor([0])
        )
