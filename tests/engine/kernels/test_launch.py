"""Launches reach the compiler for sm_90 with the arguments of real steps, and compile once whatever the step.

A stand-in for Triton's driver names the device; everything up to the launch itself is the real path: argument binding,
specialisation, compilation. A kernel that was compiled again because a length or an address changed would stall serving.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from engine.attention.random_step import paged_step
from engine.attention.triton_paged import TritonPagedAttention
from engine.models.config import ModelConfig
from engine.models.decoder import DecoderLayer, LayerCache

pytestmark = [
    pytest.mark.skipif(
        triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: kernels cannot be compiled"
    ),
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="a CUDA device is here: tests/gpu launches for real"
    ),
]


STEPS = [
    [(600, 1), (700, 1), (3, 3), (40, 20)],
    [(513, 1), (3000, 1), (700, 1), (1, 1), (3, 3)],
    [(2000, 1), (55, 21)],
    [(8000, 1)],
    [(530, 17)],
]


SHAPE = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 64, "hidden_size": 256,
    "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "hidden_act": "silu",
}  # fmt: skip


class Operations(TorchDispatchMode):
    """Names of torch's operations that would launch something on a GPU; views and new memory do not."""

    FREE = frozenset(
        ["empty", "slice", "split", "split_with_sizes", "t", "transpose", "view", "_unsafe_view", "detach"]
    )

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in self.FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def _layer() -> DecoderLayer:
    layer = DecoderLayer(ModelConfig.from_dict(SHAPE), 0, torch.bfloat16, torch.device("cpu"))
    for module in layer.modules():
        if hasattr(module, "use_kernel"):
            module.use_kernel = True
    return layer


@pytest.mark.parametrize(
    "cache_dtype",
    [None, *(pytest.param(dtype, marks=pytest.mark.full) for dtype in (torch.int8, torch.float8_e4m3fn))],
    ids=["plain", "int8", "fp8"],
)
def test_steps_of_any_shape_use_the_same_compiled_kernels_and_nine_launches_a_layer(
    launches: list[Any], cache_dtype: torch.dtype | None
) -> None:
    backend, layer, rotary = TritonPagedAttention(), _layer(), torch.zeros(8192, 64)
    for rows in STEPS:
        step = paged_step(
            rows, num_kv_heads=2, group=4, head_size=64, dtype=torch.bfloat16, cache_dtype=cache_dtype
        )
        tokens, scales = len(step.q), {"k_scale": step.k_scale, "v_scale": step.v_scale}
        slots = torch.zeros(tokens + 1, dtype=torch.int64)[1:]  # 8 bytes off, as a slice of an upload may be
        meta = replace(step.meta, slot_mapping=slots)
        x, residual = (torch.zeros(tokens, 256, dtype=torch.bfloat16) for _ in range(2))
        before = len(launches)
        with torch.no_grad(), Operations() as operations:
            layer(x, residual, slots, rotary, LayerCache(step.k_cache, step.v_cache, **scales), meta, backend)
        split, mixed = meta.num_decode_rows > 0, 0 < meta.num_decode_rows < len(rows)
        assert len(launches) - before + len(operations.names) == 9 + split + mixed, (
            launches[before:],
            operations.names,
        )
        backend.store_kv(step.q[:, :2], step.q[:, 2:4], step.k_cache, step.v_cache, slots, **scales)
    compiled: dict[str, set[str]] = {}
    for name, digest, _ in launches:
        compiled.setdefault(name, set()).add(digest)
    assert {name: len(digests) for name, digests in compiled.items()} == {
        "rms_norm_kernel": 1, "rotate_and_store_kernel": 1, "paged_attention_kernel": 2, "combine_kernel": 1,
        "silu_and_mul_kernel": 1, "store_quantized_kv_kernel" if cache_dtype else "store_kv_kernel": 1,
    }  # fmt: skip


def test_a_captured_step_is_launched_alike_whatever_its_lengths(
    launches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels, grids and addresses that depended on a length would be wrong when the graph is replayed."""
    compile_only = JITFunction.run
    seen: list[tuple[Any, ...]] = []

    def note(self: Any, *args: Any, grid: Any, **options: Any) -> Any:
        partials = [a.data_ptr() for a in args if isinstance(a, torch.Tensor) and a.dtype == torch.float32]
        seen.append((self.__name__, grid, *partials, *[a for a in args if isinstance(a, int)]))
        return compile_only(self, *args, grid=grid, **options)

    monkeypatch.setattr(JITFunction, "run", note)
    backend = TritonPagedAttention()
    backend.reserve(40, 8, 64, "cpu")
    for lengths in ([700, 1, 3000], [1, 1, 1], [5000, 4000, 3000]):
        step = paged_step(
            [(n, 1) for n in lengths], num_kv_heads=2, group=4, head_size=64, dtype=torch.bfloat16
        )
        tables = torch.zeros(3, 512, dtype=torch.int32)
        meta = replace(step.meta, block_tables=tables, max_seq_len=8192, is_captured=True)
        backend.forward(step.q, step.k_cache, step.v_cache, meta, scale=step.scale)
    assert len(seen) == 6
    assert seen[0:2] == seen[2:4] == seen[4:6]
    assert len(set(launches)) == 2
