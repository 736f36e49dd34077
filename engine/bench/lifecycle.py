"""The life of an engine at Qwen3-8B's shape: start to first token, weights from host memory in two ways, close.

- warm start: a new process until its first token from a checkpoint in the page cache, with kernels compiled by a start before it;
  imports, weights, KV cache and the first step are all inside
- weight swap: an engine that sleeps, its weights in pinned host memory, is woken up until its first token: copies, a new KV
  cache, and decode steps captured again. Beside it what came before that: going to sleep, which pins the memory the first time
- rebuild: an engine is closed and another one of the same shape built from weights in pinned host memory, until its first token
- close: bytes that torch's allocator holds when all these engines are closed, less those before the first

Adapters are not swapped here: the engine has none. Where the disk does not hold the checkpoint, Qwen3-0.6B's shape is taken.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.bench.parts.random_engine import fill_random, random_engine, write_config
from engine.bench.parts.report import Bar, print_table
from engine.bench.parts.session import Session, add_arguments, open_session
from engine.bench.parts.shapes import QWEN3_8B, QWEN3_600M, TINY, Shape
from engine.bench.parts.workload import equal_requests, run_workload
from engine.build import Progress
from engine.engine import Engine
from engine.models.decoder import Decoder
from engine.models.weights import INDEX_NAME

__all__ = ["add_arguments", "measure", "run"]

START_BAR = Bar(
    "lifecycle, warm start to first token, seconds", 15.0, 5.0, is_lower_better=True, percent=False
)
SWAP_BAR = Bar(
    "lifecycle, weight swap from host memory, seconds", 3.0, 1.0, is_lower_better=True, percent=False
)
CLOSE_BAR = Bar("lifecycle, bytes left after close", 0.0, 0.0, is_lower_better=True, percent=False)
SHARD_BYTES = 4 << 30
LIMITS: dict[str, int] = {"max_num_seqs": 64, "max_model_len": 2048}
ROOT = Path(__file__).resolve().parents[2]


def run(options: argparse.Namespace) -> dict[str, Any]:
    return measure(open_session(options), options)


def measure(session: Session, options: argparse.Namespace) -> dict[str, Any]:
    """Measure in an open session; prints tables, returns figures."""
    with tempfile.TemporaryDirectory(prefix="quire-bench-") as name:
        folder = Path(name)
        shape = TINY if session.is_tiny else _fitting_shape(folder)
        allocated = _allocated_bytes(session.device)
        weights = HostWeights()
        with random_engine(shape, session.device, load=weights.fill_and_keep, **LIMITS) as engine:
            _first_token(engine)
            sleep_s, swap_s = _sleep_and_swap_s(engine)
            close_s = _seconds(engine.close)
        rebuild_s = _rebuild_s(session, shape, weights)
        left = _allocated_bytes(session.device) - allocated
        weights.save(shape, folder)
        del weights
        starts = [_start(session, folder) for _ in range(1 if session.is_tiny else 2)]
    rows = [{"start": "first" if i == 0 else "warm"} | start for i, start in enumerate(starts)]
    print_table(f"start to first token, {shape.name}: seconds", rows)
    swaps = {"sleep_s": sleep_s, "swap_s": swap_s, "rebuild_s": rebuild_s, "close_s": close_s}
    print_table(f"weights and end, {shape.name}: seconds", [swaps])
    judged = [(START_BAR, starts[-1]["total"]), (SWAP_BAR, swap_s)]
    if session.device.type == "cuda":  # torch does not count on a CPU
        judged.append((CLOSE_BAR, float(left)))
    return {
        **session.figures(), "shape": shape.name, "starts": rows, **swaps,
        "bytes_left": left if session.device.type == "cuda" else None,
        "verdicts": [bar.judge(value, is_tiny=session.is_tiny) for bar, value in judged],
    }  # fmt: skip


class HostWeights:
    """A model's tensors in host memory under their checkpoint names; pinned where there is a GPU."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def fill_and_keep(self, decoder: Decoder, folder: Path, progress: Progress) -> None:
        """A loader: random weights, kept."""
        fill_random(decoder, folder, progress)
        for name, target in decoder.weight_targets():
            kept = torch.empty(target.shape, dtype=target.dtype, pin_memory=target.is_cuda)
            self.tensors[name] = kept.copy_(target)

    def load(self, decoder: Decoder, folder: Path, progress: Progress) -> None:
        """A loader: the kept weights."""
        for name, target in decoder.weight_targets():
            target.copy_(self.tensors[name], non_blocking=True)

    def save(self, shape: Shape, folder: Path) -> None:
        """Write a checkpoint: config.json, shards and their index."""
        write_config(shape, folder)
        places: dict[str, str] = {}
        shard: dict[str, Tensor] = {}
        for name, tensor in self.tensors.items():
            shard[name] = tensor
            if sum(t.nbytes for t in shard.values()) >= SHARD_BYTES:
                places |= _save_shard(shard, folder)
                shard = {}
        if shard:
            places |= _save_shard(shard, folder)
        (folder / INDEX_NAME).write_text(json.dumps({"weight_map": places}), encoding="utf-8")


def _save_shard(shard: dict[str, Tensor], folder: Path) -> dict[str, str]:
    name = f"model-{len(list(folder.glob('*.safetensors'))):05d}.safetensors"
    save_file(shard, folder / name)
    return dict.fromkeys(shard, name)


def _fitting_shape(folder: Path) -> Shape:
    free = shutil.disk_usage(folder).free
    return QWEN3_8B if free > 2 * 2 * QWEN3_8B.model.num_parameters else QWEN3_600M


def _sleep_and_swap_s(engine: Engine) -> tuple[float, float]:
    """Seconds to give the device's memory back, and from there to the next first token; of the second time."""
    for _ in range(2):
        sleep_s = _seconds(engine.sleep)
        began = time.perf_counter()
        engine.wake_up()
        _first_token(engine)
        swap_s = time.perf_counter() - began
    return sleep_s, swap_s


def _seconds(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _rebuild_s(session: Session, shape: Shape, weights: HostWeights) -> float:
    """Seconds from an engine that runs to the first token of the one that takes its place."""
    with random_engine(shape, session.device, load=weights.load, **LIMITS) as engine:
        _first_token(engine)
        began = time.perf_counter()
        engine.close()
        with random_engine(shape, session.device, load=weights.load, **LIMITS) as following:
            _first_token(following)
            return time.perf_counter() - began


def _first_token(engine: Engine) -> None:
    run_workload(engine, equal_requests("first token", 1, 16, 1, 64))


def _start(session: Session, folder: Path) -> dict[str, float]:
    """Seconds of one start in a process of its own, by part."""
    settings = {
        "model": str(folder), "device": str(session.device), **LIMITS,
        "attention_backend": "auto" if session.device.type == "cuda" else "reference",
    }  # fmt: skip
    command = [sys.executable, "-m", "engine.bench.parts.start_process", json.dumps(settings)]
    began = time.monotonic()  # one clock for all processes
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=max(60.0, session.left_s)
    )
    assert done.returncode == 0, f"the engine did not start: {done.stderr[-2000:]}"
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {"total": found.pop("answered") - began, **found}


def _allocated_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch._C._cuda_clearCublasWorkspaces()  # what was multiplied before the engine is not the engine's
    return torch.cuda.memory_allocated(device)
