"""Making a worker: the real engine's, or one over a runner without a model. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from engine.config import EngineConfig
    from engine.worker import EngineWorker

Progress = Callable[[str, float], None]
OnFatal = Callable[[BaseException], None]
FAKE_ANSWER = (
    "This answer comes from a runner without a model. Its scheduler, its KV blocks and its records are real: every letter "
    "is one token and one step, so that a page has something to show while you read."
)


class WorkerFactory(Protocol):
    """Makes the worker of a configuration. Runs in the loading thread; the host starts what it returns."""

    def __call__(self, config: EngineConfig, *, progress: Progress, on_fatal: OnFatal) -> EngineWorker: ...


def is_on_cpu(config: EngineConfig) -> bool:
    """Whether the engine of a config runs on the CPU. May import torch."""
    if config.device != "auto":
        return config.device == "cpu"
    import torch

    return not torch.cuda.is_available()


def load_worker(config: EngineConfig, *, progress: Progress, on_fatal: OnFatal) -> EngineWorker:
    """Build the real engine on this device. Slow; imports torch. Raises ModelLoadError, ConfigError, OutOfMemoryError."""
    progress("Importing torch", 0.05)
    from engine.build import build_engine
    from engine.worker import EngineWorker

    return EngineWorker(build_engine(config, progress=progress), on_fatal=on_fatal)


def fake_worker(
    config: EngineConfig | None = None,
    *,
    progress: Progress | None = None,
    on_fatal: OnFatal | None = None,
    answer: str = FAKE_ANSWER,
    num_blocks: int = 512,
    max_model_len: int = 2048,
    delay_s: float = 0.005,
    fail_at: dict[int, Exception] | None = None,
) -> EngineWorker:
    """A worker, not started, over FakeRunner and FakeTokenizer: real scheduler, cache and records, no model.

    Itself a WorkerFactory: ``EngineHost(config, factory=fake_worker)``. Every request is answered with `answer`; a step
    takes `delay_s`; `fail_at` maps a step's number to the exception that it raises.
    """
    from engine.worker import EngineWorker
    from workbench.fake_engine import build_fake_engine

    engine = build_fake_engine(
        config,
        answer=answer,
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        delay_s=delay_s,
        fail_at=fail_at,
    )
    return EngineWorker(engine, on_fatal=on_fatal)
