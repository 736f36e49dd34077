"""The attention interface: what a backend gets and gives, in one layout for all of them.

Boundary: paged causal attention over a block table, grouped query heads, optional sliding window, soft cap and ALiBi,
quantized caches. Rotary embedding and projections belong to the model.

Shapes: T tokens of the step, S sequences (rows), H query heads, K KV heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Where each token of the step sits. All tensors on the compute device; made once a step, shared by all layers."""

    query_start: Tensor  # [S + 1] int32, first token of each row in the flat step
    seq_lens: Tensor  # [S] int32, tokens of the row including this step's
    block_tables: Tensor  # [S, max_blocks] int32; entries past a row's last block are undefined
    slot_mapping: Tensor  # [T] int64, block_id * block_size + offset of each token
    max_query_len: int
    max_seq_len: int
    num_decode_rows: int  # rows [0, num_decode_rows) have one query token each; prefill rows follow
    # A decode step that a CUDA graph captures: it is replayed with other values in these tensors, so launches follow from
    # the number of rows alone and max_seq_len is only an upper bound. Padding rows have length 1.
    is_captured: bool = False


class AttentionBackend(Protocol):
    """One implementation of paged attention."""

    name: str

    def store_kv(
        self,
        k: Tensor,  # [T, K, D]
        v: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slot_mapping: Tensor,
        *,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> None:
        """Write k, v to their slots of k_cache, v_cache [num_blocks, K, block_size, D].

        A quantized cache (``engine.kernels.kv_quantization``) comes with its scales, which an int8 store writes too.
        """
        ...

    def forward(
        self,
        q: Tensor,  # [T, H, D]
        k_cache: Tensor,
        v_cache: Tensor,
        meta: AttentionMetadata,
        *,
        scale: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
        alibi_slopes: Tensor | None = None,  # [H] float32
        k_scale: Tensor | None = None,  # of a quantized cache, as for `store_kv`
        v_scale: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Attention of each token over its row's keys at positions ≤ its own; returns [T, H, D] in q's dtype.

        With `sliding_window` w a token at position p sees positions p - w + 1 … p. A score is ``scale * q · k``; with
        `softcap` c it becomes ``c * tanh(score / c)`` (Gemma 2), and with `alibi_slopes` its head's
        ``slope * (key position - query position)`` is added (Press et al. 2022; BLOOM, Baichuan 13B).
        """
        ...


@runtime_checkable
class CapturableAttention(AttentionBackend, Protocol):
    """A backend whose launches for decode rows can be captured and replayed with other lengths."""

    short_context: int  # tokens: while no row has more, fewer launches do, which are captured apart; 0: it is all the same

    def prepare_capture(
        self,
        num_tokens: int,
        max_rows: int,
        longest: int,
        num_heads: int,
        head_size: int,
        device: torch.device,
    ) -> None:
        """Take the memory of captured launches, once: for `max_rows` rows of `num_tokens` in all, the longest of `longest`."""
        ...

    def fits_captured(self, seq_lens: NDArray[np.int32]) -> bool:
        """Whether that memory holds a captured step over rows of these lengths [S]."""
        ...


def check_layout(k_cache: Tensor, v_cache: Tensor) -> None:
    """Assert the cache layout of ``engine.plan.KVSpec``: [num_blocks, K, block_size, D], contiguous."""
    assert k_cache.ndim == 4, f"k_cache has {k_cache.ndim} dimensions, not 4"
    assert k_cache.is_contiguous(), f"k_cache {tuple(k_cache.shape)} is not contiguous HND"
    assert v_cache.shape == k_cache.shape, (
        f"v_cache {tuple(v_cache.shape)} beside k_cache {tuple(k_cache.shape)}"
    )
    assert v_cache.is_contiguous(), f"v_cache {tuple(v_cache.shape)} is not contiguous HND"
    assert v_cache.dtype == k_cache.dtype, f"v_cache {v_cache.dtype} beside k_cache {k_cache.dtype}"
