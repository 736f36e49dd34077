"""Kernels on the GPU against their references, at real sizes; and the bits that they promise not to change."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.attention.random_step import PagedStep, excess_error, paged_step
from engine.attention.triton_paged import TritonPagedAttention
from engine.kernels.attention_tiles import SPLIT_TOKENS
from engine.kernels.fp8_linear import MIN_CAPABILITY, fp8_linear, fp8_linear_ref
from engine.kernels.kv_quantization import new_scales, store_quantized_kv_ref
from engine.kernels.logit_controls import control_logits, control_logits_ref
from engine.kernels.logprobs import token_logprobs
from engine.kernels.quantized_weight import (
    Fp8Weight,
    Int4Weight,
    Int8Weight,
    quantize_fp8,
    quantize_int4,
    quantize_int8,
)
from engine.kernels.random_sampling import FILTERED, PLAIN, TYPICAL, SamplingStep, sampling_step, wrong_rows
from engine.kernels.rms_norm import fused_add_rms_norm, rms_norm
from engine.kernels.rotary import rotate_and_store
from engine.kernels.sampling import sample_tokens, sample_tokens_ref
from engine.kernels.silu_and_mul import silu_and_mul
from engine.kernels.store_kv import store_kv, store_kv_ref
from engine.kernels.store_quantized_kv import store_quantized_kv
from engine.kernels.weight_only import FEW_TOKENS, weight_only_linear, weight_only_linear_ref
from engine.memory import decoder_bytes
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.models.layers import RMSNorm, gated, rotate
from engine.models.quantized import QUANTIZERS as WEIGHT_QUANTIZERS
from engine.models.quantized import quantize_decoder
from engine.runner.controls import Ban, Controls
from engine.runner.device_controls import DeviceControls

DECODE = [(1, 1), (16, 1), (511, 1), (512, 1), (513, 1), (4096, 1), (6000, 1)]
PREFILL = [(2, 2), (300, 300), (2048, 2048), (5000, 700)]


def _run(step: PagedStep, *, deterministic: bool = False, window: int | None = None, **form: Any) -> Tensor:
    backend = TritonPagedAttention(deterministic=deterministic)
    out = torch.full_like(step.q, float("nan"))  # an element that is not written shows
    return backend.forward(
        step.q, step.k_cache, step.v_cache, step.meta, scale=step.scale, sliding_window=window, out=out,
        k_scale=step.k_scale, v_scale=step.v_scale, **form,
    )  # fmt: skip


# Llama 8B's heads, Qwen2 7B's, a small Llama's, and heads of 80 without groups.
@pytest.mark.parametrize(
    ("kv_heads", "group", "size", "block_size"),
    [(8, 4, 128, 16), (4, 7, 128, 32), (8, 8, 64, 16), (4, 1, 80, 16)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("deterministic", [False, True])
def test_attention_agrees_with_the_definition(
    kv_heads: int,
    group: int,
    size: int,
    block_size: int,
    dtype: torch.dtype,
    deterministic: bool,
    device: torch.device,
) -> None:
    for name, rows in {"decode": DECODE, "prefill": PREFILL, "mixed": [*DECODE[4:], *PREFILL[1:]]}.items():
        step = paged_step(
            rows,
            num_kv_heads=kv_heads,
            group=group,
            head_size=size,
            block_size=block_size,
            dtype=dtype,
            device=device,
        )
        excess = excess_error(_run(step, deterministic=deterministic), step)
        assert excess <= 1.0, f"{name}: the error is {excess:.2f} of what rounding allows"


@pytest.mark.parametrize("window", [1, 100, SPLIT_TOKENS + 3, 4096])
@pytest.mark.parametrize("deterministic", [False, True])
def test_window(window: int, deterministic: bool, device: torch.device) -> None:
    rows = [(8, 1), (5000, 1), (40, 30), (5000, 900)]
    step = paged_step(rows, num_kv_heads=8, group=4, head_size=128, dtype=torch.bfloat16, device=device)
    excess = excess_error(_run(step, window=window, deterministic=deterministic), step, window)
    assert excess <= 1.0, f"the error is {excess:.2f} of what rounding allows"


def test_a_long_context(device: torch.device) -> None:
    rows = [(40000, 1), (100, 1), (33000, 40)]
    step = paged_step(rows, num_kv_heads=2, group=4, head_size=128, dtype=torch.bfloat16, device=device)
    excess = excess_error(_run(step), step)
    assert excess <= 1.0, f"the error is {excess:.2f} of what rounding allows"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_store_kv(dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(0)
    merged = torch.randn(5000, 48, 128, generator=generator, device=device).to(dtype)
    k, v = merged[:, 32:40], merged[:, 40:]
    slots = torch.randperm(400 * 16, generator=generator, device=device)[:5000]
    slots[[7, 4999]] = -1
    got, want = (
        [torch.zeros(400, 8, 16, 128, dtype=dtype, device=device) for _ in range(2)] for _ in range(2)
    )
    store_kv(k, v, got[0], got[1], slots)
    store_kv_ref(k, v, want[0], want[1], slots)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rms_norm(dtype: torch.dtype, device: torch.device) -> None:
    for rows, size in ((513, 4096), (3, 5120), (17, 80)):
        norm = _norm(size, dtype, device)
        x = torch.randn(rows, 2 * size, device=device).to(dtype)[:, :size]
        residual = 4 * torch.randn(rows, size, device=device).to(dtype)
        got = rms_norm(x, norm.weight, norm.eps)
        torch.testing.assert_close(got, norm(x), rtol=2.1 * torch.finfo(dtype).eps, atol=1e-6)
        assert torch.equal(rms_norm(x[2:3], norm.weight, norm.eps), got[2:3]), (
            "a row depends on its neighbours"
        )
        want_residual, kept = residual.clone(), residual.clone()
        want = norm(x, want_residual)
        got = fused_add_rms_norm(x.contiguous(), kept, norm.weight, norm.eps)
        assert torch.equal(kept, want_residual)
        torch.testing.assert_close(got, want, rtol=2.1 * torch.finfo(dtype).eps, atol=1e-6)
        alone = fused_add_rms_norm(x[2:3].contiguous(), residual[2:3].clone(), norm.weight, norm.eps)
        assert torch.equal(alone, got[2:3]), "a row depends on its neighbours"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_silu_and_mul(dtype: torch.dtype, device: torch.device) -> None:
    for rows, size in ((513, 14336), (3, 4864), (17, 80)):
        gate_up = 4 * torch.randn(rows, 2 * size, device=device).to(dtype)
        gate_up[0, :2] = torch.tensor([-1e4, 1e4])
        got = silu_and_mul(gate_up)
        # Two roundings; in float32 exponential and quotient add a few units in the last place.
        rtol = max(2.1 * torch.finfo(dtype).eps, 1e-6)
        torch.testing.assert_close(got, gated(gate_up, "silu", invariant=False), rtol=rtol, atol=1e-6)
        assert torch.equal(silu_and_mul(gate_up[2:3]), got[2:3]), "a row depends on its neighbours"


def _norm(size: int, dtype: torch.dtype, device: torch.device) -> RMSNorm:
    norm = RMSNorm(size, 1e-5, dtype=dtype, device=device)
    norm.weight.normal_(1.0, 0.3)
    return norm


# Heads of Llama 8B, Qwen3 0.6B, Qwen2 7B (groups of 7), a model without groups, heads of 80, and 71 queries on one key.
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"),
    [(32, 8, 128), (16, 8, 128), (28, 4, 128), (32, 32, 64), (8, 4, 80), (71, 1, 64)],
)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rotate_and_store(
    heads: int, kv_heads: int, size: int, norm: bool, dtype: torch.dtype, device: torch.device
) -> None:
    tokens, block_size, eps = 700, 16, torch.finfo(dtype).eps
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * size, device=device).to(dtype)
    angles = 6.3 * torch.rand(1000, size // 2, device=device)
    table = torch.cat((angles.cos(), angles.sin()), dim=1)
    positions = torch.randint(0, 1000, (tokens,), device=device)
    slots = torch.randperm(50 * block_size, device=device)[:tokens]
    slots[[7, 699]] = -1
    live = slots >= 0
    norms = (_norm(size, dtype, device), _norm(size, dtype, device)) if norm else None
    weights = dict(zip(("q_norm", "k_norm"), (each.weight for each in norms), strict=True)) if norms else {}
    got_caches, want_caches = torch.full(
        (2, 2, 50, kv_heads, block_size, size), 1000.0, dtype=dtype, device=device
    )

    q, k, v = qkv.unflatten(1, (-1, size)).split((heads, kv_heads, kv_heads), dim=1)
    if norms is not None:
        q, k = norms[0](q), norms[1](k)
    rows = table[positions]
    want = rotate(q, rows)
    store_kv_ref(rotate(k, rows), v, want_caches[0], want_caches[1], slots)
    whole, before = qkv.clone(), qkv.clone()
    got = rotate_and_store(whole, table, positions, *got_caches, slots, eps=1e-5, **weights)

    # One rounding of the result may fall to the other side of a tie, two of each value that the norm made; float32 sums
    # in another order add some 1e-7 of a value.
    x = torch.cat((q, k), dim=1).abs().float()
    of_values = (2.1 * eps if norm else 0.0) + 5e-7
    bound = (
        of_values * (x + x.roll(size // 2, -1))
        + 1.1 * eps * rotate(torch.cat((q, k), dim=1), rows).abs().float()
    )
    assert ((got - want).abs().float() <= bound[:, :heads])[live].all()
    blocks, offsets = slots[live] // block_size, slots[live] % block_size
    apart = got_caches[0][blocks, :, offsets] - want_caches[0][blocks, :, offsets]
    assert (apart.abs().float() <= bound[live, heads:]).all()
    assert torch.equal(got_caches[1], want_caches[1])
    assert torch.equal(got_caches[0] == 1000.0, want_caches[0] == 1000.0)
    assert torch.equal(whole[~live], before[~live])
    alone = rotate_and_store(
        qkv[3:4], table, positions[3:4], *got_caches.clone(), slots[3:4], eps=1e-5, **weights
    )
    assert torch.equal(alone, got[3:4]), "a token depends on its neighbours"


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_row_decodes_to_the_same_bits_whatever_shares_the_batch(
    deterministic: bool, device: torch.device
) -> None:
    rows = [(300, 1), (6000, 1), (17, 1), *[(100 * i, 1) for i in range(1, 60)], (600, 500)]
    step = paged_step(rows, num_kv_heads=8, group=4, head_size=128, dtype=torch.bfloat16, device=device)
    together = _run(step, deterministic=deterministic)
    for row in (0, 1, 2, 3, 30, 61):
        alone = _run(step.part(row, 0, 1), deterministic=deterministic)
        assert torch.equal(alone, together[row : row + 1]), rows[row]


# Every chunking of the same 700 tokens: as a whole, in pieces that start and end inside tiles and splits, as decode.
@pytest.mark.parametrize("window", [None, 250])
@pytest.mark.parametrize(("size", "group"), [(128, 4), (64, 7)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_deterministic_chunks_and_decode_give_the_same_bits(
    dtype: torch.dtype, size: int, group: int, window: int | None, device: torch.device
) -> None:
    whole = paged_step([(1200, 700)], num_kv_heads=2, group=group, head_size=size, dtype=dtype, device=device)
    want = _run(whole, deterministic=True, window=window)
    cuts = [0, 11, 12, 13, 140, 523, 524, 699, 700]
    for begin, end in itertools.pairwise(cuts):
        got = _run(whole.part(0, begin, end), deterministic=True, window=window)
        assert torch.equal(got, want[begin:end]), (begin, end)


@pytest.mark.parametrize("form", ["softcap", "alibi"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_soft_cap_and_alibi(form: str, deterministic: bool, device: torch.device) -> None:
    slopes = 2.0 ** -torch.arange(1, 33, device=device, dtype=torch.float32).div(4)
    chosen: dict[str, Any] = {"softcap": 5.0} if form == "softcap" else {"alibi_slopes": slopes}
    step = paged_step(
        [*DECODE, *PREFILL[:2]], num_kv_heads=8, group=4, head_size=128, dtype=torch.bfloat16, device=device
    )
    excess = excess_error(_run(step, deterministic=deterministic, **chosen), step, **chosen)
    assert excess <= 1.0, f"the error is {excess:.2f} of what rounding allows"


@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.int8], ids=["fp8", "int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("deterministic", [False, True])
def test_attention_over_a_quantized_cache(
    cache_dtype: torch.dtype, dtype: torch.dtype, deterministic: bool, device: torch.device
) -> None:
    step = paged_step(
        [*DECODE, *PREFILL], num_kv_heads=4, group=4, head_size=128, dtype=dtype, device=device,
        cache_dtype=cache_dtype, outliers=10.0,
    )  # fmt: skip
    excess = excess_error(_run(step, deterministic=deterministic), step)
    assert excess <= 1.0, f"the error is {excess:.2f} of what rounding allows"


@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.int8], ids=["fp8", "int8"])
def test_store_quantized_kv(cache_dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(0)
    merged = (torch.randn(5000, 48, 128, generator=generator, device=device) * 100).to(torch.bfloat16)
    k, v = merged[:, 32:40], merged[:, 40:]
    slots = torch.randperm(400 * 16, generator=generator, device=device)[:5000]
    slots[[7, 4999]] = -1
    caches = [torch.zeros(400, 8, 16, 128, device=device).to(cache_dtype) for _ in range(4)]
    scales = [new_scales(cache) for cache in caches]
    store_quantized_kv(k, v, *caches[:2], slots, *scales[:2])
    store_quantized_kv_ref(k, v, *caches[2:], slots, *scales[2:])
    for ours, theirs in zip((*caches[:2], *scales[:2]), (*caches[2:], *scales[2:]), strict=True):
        assert torch.equal(ours.view(torch.int8), theirs.view(torch.int8))


def test_a_captured_step_gives_the_bits_of_eager_ones_whatever_its_lengths(device: torch.device) -> None:
    rows, longest, width = 5, 6000, 400
    backend = TritonPagedAttention()
    backend.reserve(64, 32, 128, device)
    first = paged_step(
        [(1, 1)] * rows, num_kv_heads=8, group=4, head_size=128, dtype=torch.bfloat16, device=device
    )
    k_cache = torch.zeros(2000, 8, 16, 128, dtype=torch.bfloat16, device=device)
    v_cache, q = torch.zeros_like(k_cache), torch.zeros_like(first.q)
    meta = replace(
        first.meta, seq_lens=torch.ones_like(first.meta.seq_lens),
        block_tables=torch.zeros(rows, width, dtype=torch.int32, device=device),
        max_seq_len=longest, is_captured=True,
    )  # fmt: skip
    out = torch.empty_like(q)

    def launch() -> None:
        backend.forward(q, k_cache, v_cache, meta, scale=first.scale, out=out)

    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        launch()  # compiles
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    for lengths in ([1, 513, 6000, 40, 512], [6000, 6000, 1, 1, 3000], [1, 1, 1, 1, 1]):
        step = paged_step(
            [(n, 1) for n in lengths], num_kv_heads=8, group=4, head_size=128, dtype=torch.bfloat16,
            device=device, seed=sum(lengths),
        )  # fmt: skip
        k_cache[: len(step.k_cache)], v_cache[: len(step.v_cache)] = step.k_cache, step.v_cache
        q.copy_(step.q)
        meta.seq_lens.copy_(step.meta.seq_lens)
        meta.block_tables[:, : step.meta.block_tables.shape[1]] = step.meta.block_tables
        graph.replay()
        assert torch.equal(out, _run(step)), lengths


def test_repeated_launches_give_the_same_bits(device: torch.device) -> None:
    """A result that moves between launches would be a race."""
    step = paged_step(
        [*DECODE, *PREFILL], num_kv_heads=8, group=4, head_size=128, dtype=torch.bfloat16, device=device
    )
    first = _run(step)
    for _ in range(10):
        assert torch.equal(_run(step), first)


def test_launching_waits_for_nothing_and_closing_leaves_nothing(device: torch.device) -> None:
    step = paged_step(
        [(6000, 1), (300, 20)], num_kv_heads=8, group=4, head_size=128, dtype=torch.bfloat16, device=device
    )
    want = _run(step)
    torch.cuda.synchronize(device)
    gc.collect()
    before = torch.cuda.memory_allocated(device)
    backend = TritonPagedAttention()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = backend.forward(step.q, step.k_cache, step.v_cache, step.meta, scale=step.scale)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, want)
    assert backend.workspace_bytes > 0
    del got
    backend.close()
    assert torch.cuda.memory_allocated(device) == before


def _sample(
    step: SamplingStep,
    *,
    is_filtered: bool = True,
    is_typical: bool = False,
    reference: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    out = torch.full_like(step.rows, -1) if out is None else out
    function = sample_tokens_ref if reference else sample_tokens
    function(
        step.logits, step.rows, step.positions, step.settings, out, is_filtered=is_filtered, is_typical=is_typical,
        mask=step.mask,
    )  # fmt: skip
    return out


@pytest.mark.parametrize(("vocab", "num_rows"), [(61, 720), (4096, 180), (32001, 36), (128256, 36)])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("kind", ["plain", "filtered", "typical"])
def test_sampling(vocab: int, num_rows: int, masked: bool, kind: str, device: torch.device) -> None:
    kinds = {"plain": PLAIN, "filtered": PLAIN + FILTERED, "typical": PLAIN + TYPICAL + FILTERED[-4:]}[kind]
    asked = {"is_filtered": kind != "plain", "is_typical": kind == "typical"}
    step = sampling_step(kinds, vocab, num_rows=num_rows, seed=vocab, masked=masked, device=str(device))
    found = _sample(step, **asked)
    assert wrong_rows(step, found) == []
    differ = int((found != _sample(step, **asked, reference=True)).sum())
    assert differ <= num_rows // (36 if kind == "typical" else 50)
    for i in range(0, num_rows, 5):
        assert torch.equal(_sample(step.part(slice(i, i + 1)), **asked), found[i : i + 1])


def test_a_captured_step_samples_with_whatever_settings_and_logits_it_finds(device: torch.device) -> None:
    """One graph, captured over plain rows, replayed over filtered ones and over others' logits."""
    steps = [
        sampling_step(kinds, 32001, num_rows=18, seed=seed, masked=True, device=str(device))
        for seed, kinds in enumerate((PLAIN, FILTERED, PLAIN + FILTERED))
    ]
    held, out = (
        sampling_step(PLAIN, 32001, num_rows=18, masked=True, device=str(device)),
        steps[0].rows.clone(),
    )
    _sample(held, out=out)
    figures = token_logprobs(held.logits, out, 5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _sample(held, out=out)
        figures = token_logprobs(held.logits, out, 5)
    for step in steps:
        for name in ("logits", "rows", "positions", "mask"):
            getattr(held, name).copy_(getattr(step, name))
        for name in held.settings.__slots__:
            getattr(held.settings, name).copy_(getattr(step.settings, name))
        for _ in range(3):
            graph.replay()
            assert torch.equal(out, _sample(step))
            assert torch.equal(figures.chosen, token_logprobs(step.logits, out, 5).chosen)


@pytest.mark.parametrize(("vocab", "num_rows"), [(61, 9), (32001, 60), (128256, 24)])
def test_controls_change_logits_as_their_reference_does(
    vocab: int, num_rows: int, device: torch.device
) -> None:
    """Rows of all kinds; counted twice, as when a captured step is run again; and each row alone."""
    asked = (
        Controls(0), Controls(5, 1.3, 0.2, 0.4), Controls(5, biases={0: 3.0, 7: -1.5, 60: 100.0}, presence=0.5),
        Controls(5, allowed=tuple(range(0, vocab, 3))), Controls(5, bans=(Ban(3), Ban(5, (4, 2)), Ban(6, until=12))),
    )  # fmt: skip
    step = sampling_step(PLAIN, vocab, num_rows=num_rows, seed=vocab, device=str(device))
    texts = torch.randint(0, 61, (num_rows, 20), generator=torch.Generator().manual_seed(3)).int()
    texts[:, 9:12] = torch.tensor([2, 4, 2])
    positions = torch.full_like(step.rows, 12)

    def fresh() -> DeviceControls:
        made = DeviceControls(num_rows, vocab, device)
        for row in range(num_rows):
            parts = made.parts(asked[row % len(asked)], texts[row, :11].tolist())
            made.put(row, [torch.from_numpy(part).to(device) for part in parts])
        return made

    tokens, inputs, own, other = texts.to(device), (step.rows, positions), fresh(), fresh()
    found = control_logits(step.logits, *inputs, tokens, own.tables)
    expected = control_logits_ref(step.logits, *inputs, tokens, other.tables)
    # A division, a product and two sums, of which the kernel may join two, of values below 128.
    torch.testing.assert_close(found, expected, rtol=3 * 2.0**-23, atol=2e-5)
    assert torch.equal(own.tables.marks, other.tables.marks)
    assert torch.equal(control_logits(step.logits, *inputs, tokens, own.tables), found)
    for i in range(0, num_rows, 7):
        part = [x[i : i + 1] for x in (step.logits, *inputs)]
        assert torch.equal(control_logits(*part, tokens, own.tables), found[i : i + 1])


def test_sampling_waits_for_nothing(device: torch.device) -> None:
    step = sampling_step(PLAIN + FILTERED, 4096, num_rows=18, device=str(device))
    for reference in (False, True):
        want = _sample(step, reference=reference)
        torch.cuda.synchronize(device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = _sample(step, reference=reference)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(got, want)


@pytest.mark.parametrize("num_top", [0, 5, 20])
def test_logprobs(num_top: int, device: torch.device) -> None:
    logits = sampling_step(PLAIN, 128256, num_rows=9, device=str(device)).logits
    tokens = torch.randint(0, 128256, (9,), dtype=torch.int32, device=device)
    found, expected = token_logprobs(logits, tokens, num_top), logits.double().log_softmax(-1)
    own = expected.gather(1, tokens[:, None].long())
    # A log-probability of about 20 is spaced by 2e-6; the sum of 128k exponentials loses little more.
    torch.testing.assert_close(found.chosen.double(), own[:, 0], rtol=0, atol=1e-5)
    assert torch.equal(found.rank, (logits > logits.gather(1, tokens[:, None].long())).sum(-1) + 1)
    order = logits.sort(dim=-1, descending=True, stable=True).indices[:, :num_top]
    assert torch.equal(found.top_ids, order)
    torch.testing.assert_close(found.top_values.double(), expected.gather(1, order), rtol=0, atol=1e-5)


def _quantized_case(
    quantize: Callable[[Tensor], Int8Weight | Int4Weight],
    tokens: int,
    size: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Int8Weight | Int4Weight, Tensor]:
    generator = torch.Generator(device).manual_seed(tokens)
    weight = torch.randn(size, generator=generator, device=device)
    weight *= torch.rand(size[0], 1, generator=generator, device=device)
    x = torch.randn(tokens, size[1], generator=generator, device=device).to(dtype)
    return x, quantize(weight), torch.randn(size[0], generator=generator, device=device).to(dtype)


QUANTIZERS = pytest.mark.parametrize("quantize", [quantize_int8, quantize_int4])


# An 8B model's merged projections, and sizes that no tile divides.
@QUANTIZERS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(6144, 4096), (4096, 14336), (1000, 1100)])
def test_weight_only_products_agree_with_the_definition(
    quantize: Callable[[Tensor], Int8Weight | Int4Weight],
    dtype: torch.dtype,
    size: tuple[int, int],
    device: torch.device,
) -> None:
    for tokens in (1, 7, FEW_TOKENS, FEW_TOKENS + 1, 64, 65, 1000):
        x, weight, bias = _quantized_case(quantize, tokens, size, dtype, device)
        wide, exact = weight.dequantize().double(), x.double()
        want = exact @ wide.t() + bias.double()
        # One rounding to x's dtype, and as many of the float32 sum as it has terms, in any order.
        terms = exact.abs() @ wide.abs().t() + bias.double().abs()
        allowed = 0.51 * torch.finfo(dtype).eps * want.abs() + (size[1] + 3) * 2.0**-24 * terms
        for deterministic in (False, True):
            got = weight_only_linear(x, weight, bias, deterministic=deterministic)
            excess = ((got.double() - want).abs() / allowed).max().item()
            assert excess <= 1.0, f"{tokens} tokens: the error is {excess:.2f} of what rounding allows"


@QUANTIZERS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weight_only_rows_have_the_same_bits_whatever_is_beside_them(
    quantize: Callable[[Tensor], Int8Weight | Int4Weight], dtype: torch.dtype, device: torch.device
) -> None:
    x, weight, bias = _quantized_case(quantize, 300, (6144, 4096), dtype, device)
    few = weight_only_linear(x[:FEW_TOKENS], weight, bias)
    for first, past in ((0, 1), (9, 10), (4, 11)):
        assert torch.equal(weight_only_linear(x[first:past], weight, bias), few[first:past])
    together = weight_only_linear(x, weight, bias, deterministic=True)
    for first, past in ((0, 1), (9, 20), (100, 190), (299, 300)):
        alone = weight_only_linear(x[first:past], weight, bias, deterministic=True)
        assert torch.equal(alone, together[first:past])


@QUANTIZERS
@pytest.mark.parametrize("tokens", [4, 100])
def test_weight_only_products_are_captured(
    quantize: Callable[[Tensor], Int8Weight | Int4Weight], tokens: int, device: torch.device
) -> None:
    x, weight, bias = _quantized_case(quantize, tokens, (1024, 1024), torch.bfloat16, device)
    out = weight_only_linear(x, weight, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weight_only_linear(x, weight, bias, out=out)
    x.neg_()
    want = weight_only_linear(x, weight, bias)
    out.zero_()
    graph.replay()
    assert torch.equal(out, want)


def test_fp8_products_agree_with_the_definition(device: torch.device) -> None:
    if torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        pytest.skip(f"fp8 products need compute capability {MIN_CAPABILITY}")
    generator = torch.Generator(device).manual_seed(0)
    weight = quantize_fp8(torch.randn(6144, 4096, generator=generator, device=device))
    bias = torch.randn(6144, generator=generator, device=device).bfloat16()
    for tokens in (1, 7, 64, 1000):
        x = torch.randn(tokens, 4096, generator=generator, device=device).bfloat16()
        # One rounding to bfloat16; between two additions in float32 the matrix units keep about 14 bits of an fp8 sum, here
        # of 128 terms of about 1.
        torch.testing.assert_close(
            fp8_linear(x, weight, bias), fp8_linear_ref(x, weight, bias), rtol=2**-7, atol=0.1
        )


LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 512, "hidden_size": 256,
    "intermediate_size": 704, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "hidden_act": "silu",
}  # fmt: skip


@pytest.mark.parametrize("method", sorted(WEIGHT_QUANTIZERS))
def test_a_quantized_decoder_multiplies_with_what_it_holds_and_gives_the_rest_back(
    method: str, device: torch.device
) -> None:
    if method == "fp8" and torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        pytest.skip(f"fp8 products need compute capability {MIN_CAPABILITY}")
    model = ModelConfig.from_dict(LLAMA)
    decoder = Decoder(model, dtype=torch.bfloat16, device=device, max_positions=64)
    for parameter in decoder.parameters():
        parameter.normal_(0.0, 0.05)
    weights = [layer.gate_up.weight.data.cpu() for layer in decoder.layers]
    allocated, bytes_before = torch.cuda.memory_allocated(device), decoder_bytes(decoder)
    quantize_decoder(decoder, method)
    gc.collect()
    given_back = allocated - torch.cuda.memory_allocated(device)
    assert given_back == pytest.approx(
        bytes_before - decoder_bytes(decoder), rel=0.02
    )  # rounded to 512 bytes each
    x = torch.randn(5, 256, device=device).bfloat16()
    for layer, weight in zip(decoder.layers, weights, strict=True):
        quantized = WEIGHT_QUANTIZERS[method](weight.to(device))
        reference = fp8_linear_ref if isinstance(quantized, Fp8Weight) else weight_only_linear_ref
        torch.testing.assert_close(layer.gate_up(x), reference(x, quantized), rtol=2**-7, atol=1e-3)
