"""Paged decode and prefill attention against what the device can do.

Decode reads every key and value once, so its figure is KV bytes ÷ time as a share of the read bandwidth measured in the
same run (a sum over 4 GiB); prefill multiplies, so its figure is operations ÷ time as a share of the measured bfloat16
matrix rate (8192³, random data). Shape: 32 query heads over 8 KV heads of 128, blocks of 16, bfloat16, random values in
scattered blocks. Cases smaller than the pool take other blocks in each call, so that the cache of the device does not
serve them; calls are captured into one graph, so that the launch cost of Python does not count. Decode is also timed over
caches in fp8 and int8, whose scales count as bytes read.

Every case is also computed by the reference at reduced size. Without a GPU only that is done, in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.bench.parts.report import Bar
from engine.bench.parts.session import Session, open_session
from engine.bench.parts.session import add_arguments as add_session_arguments
from engine.device_limits import seconds_of
from engine.kernels.kv_quantization import QUANTIZED_DTYPES, new_scales
from engine.limits import Limits

if TYPE_CHECKING:
    from engine.attention.interface import AttentionMetadata
    from engine.attention.triton_paged import TritonPagedAttention

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 32, 8, 128, 16
TOKEN_BYTES = 2 * NUM_KV_HEADS * HEAD_SIZE * 2  # keys and values of one token in bfloat16
POOL_TOKENS = 4 << 20  # 16 GiB in bfloat16
DECODE_CASES = [
    (batch, context)
    for batch in (1, 4, 16, 64, 256)
    for context in (1024, 4096, 16384, 65536, 131072)
    if batch * context <= POOL_TOKENS
]
PREFILL_CASES = [(1, 2048), (1, 8192), (1, 32768), (16, 2048)]  # (rows, tokens of each)
CALLS = 8
BAR = Bar("attention, lowest share of the bandwidth in decode", 0.75, 0.90)
QUANTIZED_BARS = {
    dtype: Bar(f"attention, lowest share of the bandwidth in decode over {name}", 0.65, 0.85)
    for dtype, name in QUANTIZED_DTYPES.items()
}
QUANTIZED_SECONDS = 10.0  # room that the decode cases over one quantized cache are given
JUDGED_TOKENS = 65536  # batch x context from which on a case is judged


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_session_arguments(parser)
    parser.add_argument("--deterministic", action="store_true", help="the tile that decode and prefill share")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure on the GPU, or check at reduced size in the interpreter where there is none."""
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported, which is below
        print("No CUDA device: results at reduced size in Triton's interpreter, no timing.")
        return {"correctness": check_results("cpu", options.deterministic), "verdicts": []}
    return measure(open_session(options), options)


def measure(session: Session, options: argparse.Namespace) -> dict[str, Any]:
    """Measure in an open session on a GPU; prints tables, returns figures.

    Raises:
        AssertionError: a result is wrong.
    """
    correctness = check_results(session.device, options.deterministic)
    pool = make_pool(session.device)
    decode = measure_decode(pool, session.limits, options.deterministic)
    prefill = measure_prefill(pool, session.limits, options.deterministic)
    verdicts = _judge(decode, BAR)
    quantized = {}
    for dtype, bar in QUANTIZED_BARS.items():
        name = QUANTIZED_DTYPES[dtype]
        del pool  # two do not fit beside each other
        if not session.has_room(f"attention over {name}", QUANTIZED_SECONDS):
            break
        pool = make_pool(session.device, dtype)
        print(f"cache in {name}")
        quantized[name] = measure_decode(pool, session.limits, options.deterministic)
        verdicts += _judge(quantized[name], bar)
    return {
        **session.figures(), "deterministic": options.deterministic, "correctness": correctness, "decode": decode,
        "decode_quantized": quantized, "prefill": prefill, "verdicts": verdicts,
    }  # fmt: skip


def _judge(decode: list[dict[str, Any]], bar: Bar) -> list[dict[str, Any]]:
    judged = [case["share"] for case in decode if case["batch"] * case["context"] >= JUDGED_TOKENS]
    return [bar.judge(min(judged), is_tiny=False)] if judged else []


def check_results(device: str | torch.device, deterministic: bool) -> dict[str, float]:
    """Largest error as a share of what rounding allows, by case; prints a line each.

    Raises:
        AssertionError: a result is wrong.
    """
    from engine.attention.random_step import excess_error, paged_step
    from engine.attention.triton_paged import TritonPagedAttention

    backend = TritonPagedAttention(deterministic=deterministic)
    on_gpu = torch.device(device).type == "cuda"
    # The interpreter multiplies float16 right, and bfloat16, which 16-bit queries weigh quantized values in, it does not.
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if on_gpu else (torch.float16, torch.float32)
    found = {}
    mixed = [(600, 1), (70, 40)]
    cases: list[tuple[str, list[tuple[int, int]], torch.dtype | None]] = [
        ("decode", [(33, 1), (1100, 1)], None), ("mixed", mixed, None), ("prefill", [(130, 130)], None),
        *((f"mixed {name}", mixed, stored) for stored, name in QUANTIZED_DTYPES.items()),
    ]  # fmt: skip
    for dtype in dtypes:
        for name, rows, stored in cases:
            if not on_gpu and (stored is None) != (dtype == torch.float16):
                continue
            step = paged_step(
                rows,
                num_kv_heads=1,
                group=4,
                head_size=HEAD_SIZE,
                dtype=dtype,
                cache_dtype=stored,
                device=device,
            )
            got = backend.forward(
                step.q, step.k_cache, step.v_cache, step.meta, scale=step.scale, k_scale=step.k_scale,
                v_scale=step.v_scale,
            )  # fmt: skip
            error = excess_error(got, step)
            assert error <= 1.0, f"{name} in {dtype}: the error is {error:.2f} of what rounding allows"
            found[f"{name} {str(dtype).removeprefix('torch.')}"] = round(error, 3)
            print(f"  {name:10} {dtype!s:16} error {error:.2f} of what rounding allows")
    return found


@dataclass(frozen=True, slots=True)
class Pool:
    """Random keys and values [num_blocks, K, block_size, D], and every block once in random order."""

    k_cache: Tensor
    v_cache: Tensor
    order: Tensor  # [num_blocks] int32
    scale: Tensor | None  # of a quantized cache, for keys and values

    @property
    def num_tokens(self) -> int:
        return len(self.order) * BLOCK_SIZE

    @property
    def token_bytes(self) -> float:
        """What attention reads for one token: keys, values, and int8's scales."""
        own_scales = self.scale is not None and self.scale.ndim == 3
        return 2 * NUM_KV_HEADS * (HEAD_SIZE * self.k_cache.itemsize + 4 * own_scales)


def make_pool(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Pool:
    """As large as `POOL_TOKENS`, or 60 % of the free memory if that is less; of as many tokens in any dtype."""
    free, _ = torch.cuda.mem_get_info(device)
    tokens = min(POOL_TOKENS, int(0.6 * free) // TOKEN_BYTES)
    shape = (tokens // BLOCK_SIZE, NUM_KV_HEADS, BLOCK_SIZE, HEAD_SIZE)
    order = torch.randperm(shape[0], device=device).int()
    if dtype == torch.int8:
        caches = [torch.randint(-127, 128, shape, dtype=dtype, device=device) for _ in range(2)]
        return Pool(caches[0], caches[1], order, new_scales(caches[0]).fill_(1 / 40))
    caches = [torch.empty(shape, dtype=torch.bfloat16, device=device).normal_().to(dtype) for _ in range(2)]
    return Pool(caches[0], caches[1], order, new_scales(caches[0]) if dtype in QUANTIZED_DTYPES else None)


def measure_decode(pool: Pool, limits: Limits, deterministic: bool = False) -> list[dict[str, Any]]:
    """Time every decode case that fits the pool; prints the table."""
    print(f"{'batch':>6} {'context':>8} {'µs':>9} {'TB/s':>6} {'of limit':>9}")
    found = []
    for batch, context in DECODE_CASES:
        if batch * context > pool.num_tokens:
            print(f"{batch:6d} {context:8d}  left out: the pool holds {pool.num_tokens} tokens")
            continue
        seconds = _time_case(pool, [(context, 1)] * batch, deterministic)
        rate = batch * context * pool.token_bytes / seconds
        share = rate / limits.bytes_s
        verdict = BAR.verdict(share) if batch * context >= JUDGED_TOKENS else ""
        print(f"{batch:6d} {context:8d} {seconds * 1e6:9.1f} {rate / 1e12:6.2f} {share:8.0%}  {verdict}")
        found.append(
            {
                "batch": batch,
                "context": context,
                "seconds": seconds,
                "bytes_s": rate,
                "share": round(share, 4),
            }
        )
    return found


def measure_prefill(pool: Pool, limits: Limits, deterministic: bool = False) -> list[dict[str, Any]]:
    """Time every prefill case; prints the table. Causal: half of the full square counts."""
    print(f"{'rows':>6} {'tokens':>8} {'µs':>9} {'TFLOP/s':>8} {'of limit':>9}")
    found = []
    for rows, tokens in PREFILL_CASES:
        seconds = _time_case(pool, [(tokens, tokens)] * rows, deterministic)
        rate = 4 * NUM_HEADS * HEAD_SIZE * rows * tokens * (tokens + 1) / 2 / seconds
        share = rate / limits.flops_s
        print(f"{rows:6d} {tokens:8d} {seconds * 1e6:9.1f} {rate / 1e12:8.0f} {share:8.0%}")
        found.append(
            {"rows": rows, "tokens": tokens, "seconds": seconds, "flops_s": rate, "share": round(share, 4)}
        )
    return found


def _time_case(pool: Pool, rows: list[tuple[int, int]], deterministic: bool) -> float:
    """Seconds of one call, from a captured graph of several that walk through the pool."""
    from engine.attention.triton_paged import TritonPagedAttention

    device = pool.order.device
    blocks = sum(-(-length // BLOCK_SIZE) for length, _ in rows)
    calls = min(CALLS, max(1, len(pool.order) // blocks))
    metas = [_metadata(pool.order[i * blocks : (i + 1) * blocks], rows) for i in range(calls)]
    q = torch.randn(
        sum(query for _, query in rows), NUM_HEADS, HEAD_SIZE, dtype=torch.bfloat16, device=device
    )
    backend = TritonPagedAttention(deterministic=deterministic)
    out = torch.empty_like(q)

    def work() -> None:
        _walk(backend, q, pool, metas, out)

    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        work()  # compiles, and takes the workspace
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    with torch.cuda.graph(graph):
        work()
    seconds = seconds_of(graph.replay) / calls
    assert bool(out.isfinite().all()), "a result is not finite"
    return seconds


def _walk(
    backend: TritonPagedAttention, q: Tensor, pool: Pool, metas: list[AttentionMetadata], out: Tensor
) -> None:
    for meta in metas:
        backend.forward(
            q, pool.k_cache, pool.v_cache, meta, scale=HEAD_SIZE**-0.5, out=out, k_scale=pool.scale,
            v_scale=pool.scale,
        )  # fmt: skip


def _metadata(blocks: Tensor, rows: list[tuple[int, int]]) -> AttentionMetadata:
    """Rows of equal length over the given blocks."""
    from engine.attention.interface import AttentionMetadata

    length, query = rows[0]
    starts = torch.arange(len(rows) + 1, dtype=torch.int32, device=blocks.device) * query
    return AttentionMetadata(
        query_start=starts,
        seq_lens=torch.full((len(rows),), length, dtype=torch.int32, device=blocks.device),
        block_tables=blocks.view(len(rows), -1),
        slot_mapping=torch.empty(0, dtype=torch.int64, device=blocks.device),  # nothing is stored
        max_query_len=query,
        max_seq_len=length,
        num_decode_rows=len(rows) if query == 1 else 0,
    )
