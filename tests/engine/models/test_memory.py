"""The ledger counts what is held; a pool is sized by what the largest step was seen to take."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.build import build_engine, resolve_config
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import OutOfMemoryError
from engine.kernels import cpu_library
from engine.memory import DeviceMemory
from engine.runner.profile_run import PROFILE_BLOCKS, largest_steps
from engine.sampling_params import MAX_LOGPROBS, SamplingParams

ROOT = Path(__file__).parents[3]
MIB = 1 << 20
BLOCK_BYTES = 16 * 3 * 2 * 2 * 12 * 4  # 16 tokens, 3 layers, K and V, 2 heads of 12, float32


@pytest.fixture
def folder(tiny_models: Callable[[str], Any]) -> Path:
    found: Path = tiny_models("llama3_gqa_tied").folder
    return found


def config_of(folder: Path, **settings: Any) -> EngineConfig:
    return EngineConfig(
        model=str(folder), **{"device": "cpu", "num_threads": 1, "dtype": "float32", **settings}
    )


class Given:
    """An allocator of given figures: `free` before and `free_loaded` after the weights were read; and what was held, and
    the most that was, in the profile run. Graphs: 2 MiB of another engine, and what the profile run and this engine captured."""

    def __init__(
        self, free: int, free_loaded: int, held: int, peak: int, graphs: tuple[int, int] = (0, 0)
    ) -> None:
        self._free = [free, free, free_loaded]
        self._held, self._peak = held, peak
        self._graphs = [0, 0, *graphs]
        self.resets = 0

    def memory(self) -> DeviceMemory:
        return DeviceMemory(64 * MIB, self._free.pop(0))

    def reset_peak(self) -> None:
        self.resets += 1

    def held_bytes(self) -> int:
        assert self.resets == 1, "read before unused pieces were given back"
        return self._held

    def peak_bytes(self) -> int:
        return self._peak

    def graph_bytes(self) -> int:
        return 2 * MIB + self._graphs.pop(0)


# ── counted ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def tensors_alive() -> dict[int, Tensor]:
    """One tensor for each storage in the process, by its address."""
    gc.collect()
    found = [o for o in gc.get_objects() if issubclass(type(o), Tensor) and o.device.type == "cpu"]
    return {t.untyped_storage().data_ptr(): t for t in found}


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama3_gqa_tied", {"attention_backend": "reference"}),
        ("llama2_mha_untied", {"attention_backend": "reference", "dtype": "float64"}),
        ("llama_yarn_biased", {"attention_backend": "reference", "dtype": "bfloat16"}),
        ("qwen3_norm_window", {"attention_backend": "reference", "deterministic": True}),
        ("llama3_gqa_tied", {"attention_backend": "reference", "kv_cache_dtype": "int8"}),
        ("llama2_mha_untied", {"attention_backend": "reference", "kv_cache_dtype": "fp8"}),
    ],
)
def test_weights_and_cache_are_counted_to_the_byte(
    family: str, settings: dict[str, Any], tiny_models: Callable[[str], Any]
) -> None:
    """What the engine's making added to the process is the ledger's weights, its KV cache and the runner's row buffers."""
    folder = tiny_models(family).folder
    before = set(tensors_alive())
    engine = build_engine(config_of(folder, num_blocks=20, max_num_seqs=4, **settings))
    added = [t.untyped_storage().nbytes() for at, t in tensors_alive().items() if at not in before]
    ledger = engine.stats().memory
    assert ledger is not None
    runner: Any = engine._runner
    rows = runner._batch.tokens.nbytes  # block tables and settings are no tensors on a CPU
    assert ledger.weights_bytes + ledger.kv_bytes == sum(added) - rows
    caches = [t for c in runner._caches for t in (c.k, c.v, c.k_scale, c.v_scale) if t is not None]
    assert ledger.kv_bytes == sum({t.data_ptr(): t.nbytes for t in caches}.values())
    engine.close()


@pytest.mark.skipif(cpu_library.load() is None, reason="no compiled CPU kernels here")
@pytest.mark.parametrize("family", ["llama3_gqa_tied", "llama2_mha_untied", "llama_yarn_biased"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_weights_are_counted_as_they_are_kept(
    family: str, dtype: str, tiny_models: Callable[[str], Any]
) -> None:
    engine = build_engine(config_of(tiny_models(family).folder, dtype=dtype, num_blocks=20))
    decoder: Any = engine._runner._decoder  # type: ignore[attr-defined]
    tensors: list[Tensor] = [decoder._rotary]
    for kept in decoder._kept:
        tensors += (
            [kept] if isinstance(kept, Tensor) else [t for t in (kept.values, kept.bias) if t is not None]
        )
    ledger = engine.stats().memory
    assert ledger is not None
    assert ledger.weights_bytes == sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
    engine.close()


def test_panels_of_exact_weights_take_half_the_ledger_of_float32(
    tiny_models: Callable[[str], Any], tmp_path: Path
) -> None:
    """A bfloat16 checkpoint in float32 mode is kept in bfloat16 panels: four bytes a value would be twice too much."""
    if cpu_library.load() is None:
        pytest.skip("no compiled CPU kernels here")
    tiny = tiny_models("wide_llama")
    tiny.reference.to(torch.bfloat16).save_pretrained(tmp_path)
    tiny.reference.float()
    engine = build_engine(config_of(tmp_path, num_blocks=20))
    ledger = engine.stats().memory
    assert ledger is not None
    values = sum(p.numel() for p in tiny.reference.parameters())
    assert (
        ledger.weights_bytes < 3 * values
    )  # 2 bytes a value, padding of panels, norms and tables in float32
    engine.close()


def test_the_ledger_leaves_what_is_free(folder: Path) -> None:
    engine = build_engine(config_of(folder, num_blocks=20))
    ledger = engine.stats().memory
    assert ledger is not None
    parts = ledger.engine_bytes + ledger.other_bytes + ledger.free_bytes
    assert parts == ledger.total_bytes
    assert min(ledger.other_bytes, ledger.free_bytes, ledger.workspace_bytes) > 0
    engine.close()


# ── measured ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_pool_is_what_the_largest_step_leaves(folder: Path) -> None:
    workspace, graphs = 2 * MIB + 12345, 3 * MIB + 67
    peak = 5 * MIB + PROFILE_BLOCKS * BLOCK_BYTES + workspace
    allocator = Given(40 * MIB, 38 * MIB, 5 * MIB, peak, (graphs, graphs + 100))
    config = config_of(folder, max_num_seqs=200, max_batched_tokens=64)
    engine = build_engine(config, allocator=allocator)
    ledger = engine.stats().memory
    assert ledger is not None
    assert ledger.workspace_bytes == workspace
    assert ledger.graphs_bytes == graphs + 100, "what was captured in the end, without the other engine's"
    assert ledger.other_bytes == 24 * MIB
    # A CPU's share of what is left; what was free after the weights counts, not what was expected before.
    assert engine.config.num_blocks == int(0.25 * (38 * MIB - workspace - graphs)) // BLOCK_BYTES
    assert (
        engine.config.num_blocks != resolve_config(config, memory=DeviceMemory(64 * MIB, 40 * MIB)).num_blocks
    )
    assert engine.stats().num_blocks == engine.config.num_blocks
    assert answers(engine) == answers(build_engine(config))


def answers(engine: Engine) -> list[int]:
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    engine.add(engine.make_request(list(range(1, 40)), params, request_id="r"))
    tokens: list[int] = []
    while engine.has_work:
        for delta in engine.step().deltas:
            assert delta.error is None, delta.error
            tokens += delta.token_ids
    engine.close()
    return tokens


def test_what_was_asked_for_is_refused_where_the_largest_step_leaves_less(folder: Path) -> None:
    workspace = 30 * MIB
    allocator = Given(40 * MIB, 38 * MIB, 0, PROFILE_BLOCKS * BLOCK_BYTES + workspace, (4 * MIB, 0))
    config = config_of(folder, num_blocks=1000, max_num_seqs=200, max_batched_tokens=64)
    with pytest.raises(
        OutOfMemoryError, match=r"workspace 30 MiB and captured graphs 4 MiB.*num_blocks="
    ) as caught:
        build_engine(config, allocator=allocator)
    assert caught.value.limit == 34 * MIB - workspace


def test_a_context_that_nobody_asked_for_shrinks_with_the_pool(folder: Path) -> None:
    allocator = Given(40 * MIB, 8 * MIB, 0, PROFILE_BLOCKS * BLOCK_BYTES + 8 * MIB - 12 * BLOCK_BYTES)
    engine = build_engine(config_of(folder, max_num_seqs=8, max_batched_tokens=64), allocator=allocator)
    assert engine.config.num_blocks == 3
    assert engine.config.max_model_len == 48
    assert len(answers(engine)) == 48 - 39


@pytest.mark.parametrize(
    ("max_num_seqs", "max_batched_tokens", "max_model_len"), [(256, 8192, 1024), (7, 100, 50), (64, 32, 200), (1, 512, 2048), (3, 4096, 64)]
)  # fmt: skip
def test_the_largest_steps_are_as_large_as_the_config_allows(
    max_num_seqs: int, max_batched_tokens: int, max_model_len: int
) -> None:
    config = EngineConfig(
        model="m",
        max_num_seqs=max_num_seqs,
        max_batched_tokens=max_batched_tokens,
        max_model_len=max_model_len,
    )
    widest, deepest = largest_steps(config, vocab_size=1000)
    rows = min(max_num_seqs, max_batched_tokens)
    assert widest.total_tokens == min(max_batched_tokens, rows * (max_model_len - 1))
    assert len(widest.logit_rows) == widest.num_rows == deepest.num_rows == rows
    assert list(widest.num_tokens) == sorted(widest.num_tokens), "rows of one token come first"
    assert (deepest.start + deepest.num_tokens == max_model_len).all()
    assert widest.admitted[-1].params.prompt_logprobs == MAX_LOGPROBS
    for plan in (widest, deepest):
        for row, start, count in zip(plan.admitted, plan.start, plan.num_tokens, strict=True):
            (blocks,) = row.block_ids
            assert len(row.token_ids) == start + count
            assert len(blocks) * config.block_size >= start + count
            assert max(blocks) < PROFILE_BLOCKS
    assert np.array_equal(deepest.finished, widest.rows)


# ── the estimate of a CPU, against its resident memory ──────────────────────────────────────────────────────────────

# The estimate is an upper one, of copies that no step makes all at once: of what it says, at least a third is seen.
LEAST_SEEN = 1 / 3


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc/self/clear_refs")
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("cpu", "float32"),
        pytest.param("cpu", "bfloat16", marks=pytest.mark.full),
        ("reference", "float32"),
    ],
)
def test_the_estimate_covers_what_the_largest_steps_take(backend: str, dtype: str) -> None:
    if backend == "cpu" and cpu_library.load() is None:
        pytest.skip("no compiled CPU kernels here")
    grown, estimate = measure_resident("steps", backend, dtype)
    assert grown <= estimate
    assert grown >= LEAST_SEEN * estimate


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc/self/clear_refs")
def test_scoring_a_long_text_never_holds_all_its_logits() -> None:
    """4,096 tokens in one step, 32,000 logits each: 500 MiB in float32, of which scoring holds less than half at once.

    Torch's reference attention would hold more than that for its own scores: the compiled one runs.
    """
    if cpu_library.load() is None:
        pytest.skip("no compiled CPU kernels here")
    grown, all_logits = measure_resident("score", "cpu", "float32")
    assert all_logits == 4096 * 32000 * 4
    assert 0 < grown < all_logits / 2


def measure_resident(*args: str) -> tuple[int, int]:
    """Growth of resident memory in a process of its own, and what it is compared with; both in bytes."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "MALLOC_MMAP_THRESHOLD_": "65536",  # else glibc keeps what is freed, and growth is not seen
    }
    script = Path(__file__).with_name("resident_growth.py")
    done = subprocess.run(
        [sys.executable, str(script), *args], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    grown, compared = done.stdout.split()[-2:]
    return int(grown), int(compared)
