"""Engines with random weights in a given shape, built as every engine is, but from a folder that holds a config.json alone."""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from engine.bench.parts.shapes import Shape
from engine.build import Loader, Progress, build_engine
from engine.config import EngineConfig
from engine.engine import Engine
from engine.models.decoder import Decoder


def fill_random(decoder: Decoder, folder: Path, progress: Progress) -> None:
    """Norms are one, matrices normal with the spread that keeps a layer's output as large as its input; always the same."""
    device = decoder.embedding.device
    generator = torch.Generator(device).manual_seed(0)
    for parameter in decoder.parameters():
        if parameter.ndim == 1:
            parameter.data.fill_(1.0)
        else:
            parameter.data.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)


@contextmanager
def random_engine(
    shape: Shape, device: torch.device, *, load: Loader = fill_random, **settings: Any
) -> Iterator[Engine]:
    """An engine of this shape; closed, and its memory given back, when the block ends. `settings`: of EngineConfig.

    bfloat16 on a GPU; on a CPU float32 in one thread with torch's reference attention, which needs no compiler.

    Raises:
        ConfigError: a setting that this engine does not have.
        OutOfMemoryError: the shape does not fit the device.
    """
    fitting = (
        {"dtype": "bfloat16"}
        if device.type == "cuda"
        else {"dtype": "float32", "attention_backend": "reference", "num_threads": 1}
    )
    with tempfile.TemporaryDirectory(prefix="quire-bench-") as folder:
        write_config(shape, Path(folder))
        config = {"model": folder, "device": str(device), **fitting, **settings}
        engine = build_engine(EngineConfig.from_dict(config), load=load)
    try:
        yield engine
    finally:
        engine.close()
        free_memory()


def write_config(shape: Shape, folder: Path) -> None:
    """config.json of the shape."""
    (folder / "config.json").write_text(json.dumps(shape.values), encoding="utf-8")


def free_memory() -> None:
    """Let go of what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
