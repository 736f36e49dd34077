"""TritonPagedAttention: the attention backend of GPUs.

One step takes at most two kinds of launch: decode rows (one token each) with their keys split over programs and merged
by a second kernel, and the remaining rows by query tiles. Which launches happen follows from host integers of the
metadata alone, so nothing waits for the device; how keys are cut follows from absolute positions, so a row's decode
result has the same bits whatever shares the batch. With `deterministic` the same holds across decode and prefill, that is
for any chunking, prefix hit or preemption. The launches of a captured step follow from its number of rows: whatever
lengths it is replayed with, each split is folded as in an eager step, and its bits are the same.

Boundary: launches and their workspace. Kernels: `engine.kernels`. It allocates no KV memory and sets no stream: work goes
to the current stream of the tensors' device.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.attention.interface import AttentionMetadata, check_layout
from engine.errors import ConfigError
from engine.kernels.attention_tiles import (
    DTYPES,
    MAX_HEAD_SIZE,
    SPLIT_TOKENS,
    AttentionShape,
    Mode,
    captured_split_programs,
    max_splits,
    num_partials,
)
from engine.kernels.kv_quantization import QUANTIZED_DTYPES, check_scales
from engine.kernels.paged_attention import Partials, launch_attention, launch_combine
from engine.kernels.store_kv import store_kv
from engine.kernels.store_quantized_kv import store_quantized_kv

# Enough for 8,000 partials of 32 heads of 128: every multiprocessor is busy many times over before a launch is cut.
MAX_WORKSPACE_BYTES = 128 << 20


class TritonPagedAttention:
    """Paged attention by Triton kernels; implements `engine.attention.interface.AttentionBackend`.

    The workspace for partial results grows to what the longest context seen needs, at most `max_workspace_bytes`, and
    stays; rows beyond it are done in further launches, with the same bits. Once `reserve` has been called it neither
    moves nor grows. One instance serves one stream.
    """

    name = "triton"
    short_context = SPLIT_TOKENS

    def __init__(
        self, *, deterministic: bool = False, max_workspace_bytes: int = MAX_WORKSPACE_BYTES
    ) -> None:
        self.deterministic = deterministic
        self._max_workspace_bytes = max_workspace_bytes
        self._workspace: Tensor | None = None
        self._is_reserved = False
        self._num_partials = 0

    @staticmethod
    def check_supported(dtype: torch.dtype, head_size: int) -> None:
        """Say before any work what these kernels cannot do.

        Raises:
            ConfigError: the dtype has no kernel, or the head size exceeds one tile.
        """
        if dtype not in DTYPES:
            raise ConfigError(
                f"the triton attention backend has no kernel for {dtype}",
                value=str(dtype), limit=[str(d) for d in DTYPES], param="dtype",
                remedy="Use attention_backend='reference' or another dtype.",
            )  # fmt: skip
        if head_size > MAX_HEAD_SIZE:
            raise ConfigError(
                f"the triton attention backend takes head sizes up to {MAX_HEAD_SIZE}, got {head_size}",
                value=head_size, limit=MAX_HEAD_SIZE, param="attention_backend",
                remedy="Use attention_backend='reference'.",
            )  # fmt: skip

    @property
    def workspace_bytes(self) -> int:
        """Bytes that partial results hold now."""
        return 0 if self._workspace is None else self._workspace.numel() * self._workspace.element_size()

    def close(self) -> None:
        """Give the workspace back."""
        self._workspace, self._is_reserved = None, False

    def reserve(self, num_partials: int, num_heads: int, head_size: int, device: torch.device | str) -> None:
        """Take the workspace once, for so many partial results of H heads of D; captured steps keep its address.

        A captured step fits if `attention_tiles.num_partials` of its lengths is at most this: its caller has to look,
        for the launch cannot. An eager step that needs more is cut into several launches, row by row at the least, so
        the longest context alone must fit.
        """
        assert not self._is_reserved, (
            "the workspace is reserved already: captured graphs may hold its address"
        )
        self._workspace = None  # let go of the old one first: the two together need not fit
        self._workspace = torch.empty(
            _numel(num_partials * num_heads, head_size), dtype=torch.float32, device=device
        )
        self._is_reserved = True

    def prepare_capture(
        self,
        num_tokens: int,
        max_rows: int,
        longest: int,
        num_heads: int,
        head_size: int,
        device: torch.device,
    ) -> None:
        """Reserve the workspace of rows that share no block; rows of a long shared prefix may need more, and do not fit."""
        self._num_partials = max(num_tokens // SPLIT_TOKENS + 2 * max_rows, max_splits(longest, None))
        self.reserve(self._num_partials, num_heads, head_size, device)

    def fits_captured(self, seq_lens: NDArray[np.int32]) -> bool:
        """Whether the reserved workspace holds a captured step over rows of these lengths [S], and as many of padding."""
        return num_partials(seq_lens) + len(seq_lens) <= self._num_partials

    def store_kv(
        self,
        k: Tensor,
        v: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slot_mapping: Tensor,
        *,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> None:
        """Write k, v [T, K, D] to their slots of k_cache, v_cache [num_blocks, K, block_size, D]."""
        if k_scale is None or v_scale is None:
            store_kv(k, v, k_cache, v_cache, slot_mapping)
        else:
            store_quantized_kv(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)

    def forward(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        meta: AttentionMetadata,
        *,
        scale: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
        alibi_slopes: Tensor | None = None,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Attention of each token over its row's keys at positions ≤ its own; returns [T, H, D] in q's dtype.

        Decode rows must come first, as in a StepPlan. `q` and `out` may have any token stride; heads lie side by side.
        """
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
        _check(q, k_cache, v_cache, meta, out)
        check_scales(k_cache, k_scale, v_scale)
        if alibi_slopes is not None:
            assert (alibi_slopes.shape, alibi_slopes.dtype) == (q.shape[1:2], torch.float32), alibi_slopes
            assert alibi_slopes.is_contiguous()
        shape = AttentionShape(
            k_cache.shape[1],
            q.shape[1] // k_cache.shape[1],
            q.shape[2],
            k_cache.shape[2],
            q.dtype,
            sliding_window or None,
            softcap or None,
            alibi_slopes is not None,
            k_cache.dtype if k_cache.dtype in QUANTIZED_DTYPES else None,
        )
        given = {"alibi_slopes": alibi_slopes, "k_scale": k_scale, "v_scale": v_scale}
        optional = {name: tensor for name, tensor in given.items() if tensor is not None}
        if shape.cache_dtype:
            k_cache, v_cache = k_cache.view(torch.int8), v_cache.view(torch.int8)
        if meta.num_decode_rows:
            self._decode(out, q, k_cache, v_cache, meta, shape, scale, optional)
        rows = meta.seq_lens.shape[0] - meta.num_decode_rows
        if rows:
            launch_attention(
                out, q, k_cache, v_cache, meta, shape, Mode.PREFILL, self.deterministic, scale,
                first_row=meta.num_decode_rows, num_rows=rows, split_programs=1, partials=None, optional=optional,
            )  # fmt: skip
        return out

    def _decode(
        self, out: Tensor, q: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMetadata,
        shape: AttentionShape, scale: float, optional: dict[str, Tensor],
    ) -> None:  # fmt: skip
        num_rows = rows_at_once = meta.num_decode_rows
        splits = split_programs = max_splits(meta.max_seq_len, shape.window)
        mode = Mode.DECODE if splits > 1 else Mode.DECODE_DIRECT
        partials = None
        if mode is Mode.DECODE:
            partials, rows_at_once = self._partials(q, num_rows, splits)
        if meta.is_captured:
            assert partials is None or self._is_reserved, (
                "a captured step needs a workspace that never moves: reserve()"
            )
            rows_at_once = num_rows
            split_programs = captured_split_programs(num_rows, shape.num_kv_heads, splits)
        for first in range(0, num_rows, rows_at_once):
            rows = min(rows_at_once, num_rows - first)
            launch_attention(
                out, q, k_cache, v_cache, meta, shape, mode, self.deterministic, scale,
                first_row=first, num_rows=rows, split_programs=split_programs, partials=partials,
                optional=optional,
            )  # fmt: skip
            if partials is not None:
                launch_combine(out, partials, meta, shape, first_row=first, num_rows=rows)

    def _partials(self, q: Tensor, rows: int, splits: int) -> tuple[Partials, int]:
        """The workspace as (sums, peaks, totals), and of how many rows it holds the partials."""
        _, heads, size = q.shape
        if not self._is_reserved:
            most = self._max_workspace_bytes // (4 * splits * heads * (size + 2))
            self._grow(max(1, min(rows, most)) * splits * heads, size, q.device)
        workspace = self._workspace
        assert workspace is not None
        assert workspace.device == q.device, (workspace.device, q.device)
        cells = workspace.numel() // (size + 2) // 4 * 4
        fitting = cells // (splits * heads)
        assert fitting, (
            f"a row of {splits} splits of {heads} heads in a workspace reserved for {cells} of them"
        )
        sums, peaks, totals = torch.split(workspace[: cells * (size + 2)], [cells * size, cells, cells])
        return (sums, peaks, totals), min(rows, fitting)

    def _grow(self, cells: int, size: int, device: torch.device) -> None:
        workspace = self._workspace
        if workspace is not None and workspace.device == device and workspace.numel() >= _numel(cells, size):
            return
        doubled = 0 if workspace is None else min(2 * workspace.numel(), self._max_workspace_bytes // 4)
        # Let go of the old one first: the two together need not fit. Both live on one stream, so memory that a
        # running kernel still reads is not handed to another stream.
        self._workspace = workspace = None
        self._workspace = torch.empty(max(_numel(cells, size), doubled), dtype=torch.float32, device=device)


def _numel(cells: int, size: int) -> int:
    """Values of a workspace for so many partial results of one head.

    Whole multiples of 16 bytes: an address that is aligned in one step and not in the next would compile again.
    """
    return -(-cells // 4) * 4 * (size + 2)


def _check(q: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMetadata, out: Tensor) -> None:
    check_layout(k_cache, v_cache)
    heads, size = q.shape[1:]
    kv_heads, block_size = k_cache.shape[1:3]
    assert k_cache.dtype in (q.dtype, *QUANTIZED_DTYPES), f"queries in {q.dtype}, cache in {k_cache.dtype}"
    assert q.dtype in DTYPES, q.dtype
    assert size == k_cache.shape[3], f"head size {size} over a cache of {k_cache.shape[3]}"
    assert size <= MAX_HEAD_SIZE, size
    assert heads % kv_heads == 0, f"{heads} query heads over {kv_heads} KV heads"
    assert (out.shape, out.dtype) == (q.shape, q.dtype), (out.shape, out.dtype)
    for tensor in (q, out):
        assert tensor.stride()[1:] == (size, 1), f"heads of a token are not side by side: {tensor.stride()}"
    for tensor in (meta.query_start, meta.seq_lens, meta.block_tables):
        assert (tensor.dtype, tensor.stride(-1)) == (torch.int32, 1), (tensor.dtype, tensor.stride())
        assert tensor.device == q.device, (tensor.device, q.device)
    assert 0 <= meta.num_decode_rows <= meta.seq_lens.shape[0]
    assert -(-meta.max_seq_len // block_size) <= meta.block_tables.shape[1], (
        "block table narrower than the longest row"
    )
