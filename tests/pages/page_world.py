"""Hosts for page tests: the real worker, scheduler, cache and records over FakeRunner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from streamlit.testing.v1 import AppTest

from engine.config import EngineConfig
from engine.engine import Engine
from engine.fake_runner import FakeRunner
from engine.fake_tokenizer import FakeTokenizer
from engine.plan import KVSpec
from engine.records import MemoryLedger
from engine.worker import EngineWorker
from workbench.host import FAKE_MODEL, EngineHost

ROOT = Path(__file__).resolve().parents[2]
NUM_BLOCKS, BLOCK_SIZE = 64, 16


def make_worker(
    *,
    num_blocks: int = NUM_BLOCKS,
    on_fatal: Any = None,
    runner_type: type[FakeRunner] = FakeRunner,
    tokenizer: FakeTokenizer | None = None,
    **runner_options: Any,
) -> tuple[EngineWorker, FakeRunner]:
    """A worker, not started, over a small FakeRunner."""
    tokenizer = tokenizer or FakeTokenizer()
    runner = runner_type(num_blocks, BLOCK_SIZE, vocab_size=256, **runner_options)
    config = EngineConfig(
        model=FAKE_MODEL, block_size=BLOCK_SIZE, num_blocks=num_blocks, max_batched_tokens=256, max_num_seqs=8,
        max_model_len=512, dtype="float32", device="cpu",
    )  # fmt: skip
    engine = Engine(
        config,
        runner,
        kv_spec=KVSpec(num_layers=1, num_kv_heads=1, head_size=4, block_size=BLOCK_SIZE, dtype_bytes=4),
        eos_token_ids=tokenizer.eos_token_ids,
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer,
        memory=MemoryLedger(14 * 2**20, 96 * 2**20, 8 * 2**20, 8 * 2**30, "cpu"),
    )
    return EngineWorker(engine, on_fatal=on_fatal), runner


class ToolTokenizer(FakeTokenizer):
    """FakeTokenizer with the tool-call tokens of Hermes, for a model that reasons."""

    SPECIAL = (*FakeTokenizer.SPECIAL, "<tool_call>", "</tool_call>")
    chat_template = "<think></think><tool_call></tool_call>"  # what a real one would name


def spoken(*answers: str) -> Any:
    """Makes the first request answer the first text, and so on; tags of calls are tokens."""
    tokenizer, order = ToolTokenizer(), list[str]()

    def choose(request_id: str, index: int) -> int:
        if request_id not in order:
            order.append(request_id)
        ids = [*tokenizer.encode(answers[order.index(request_id)]), tokenizer.EOS]
        return ids[index]

    return choose


class FakeHost:
    """An EngineHost with its runners at hand, so that a test can make them answer or fail."""

    def __init__(self, **runner_options: Any) -> None:
        self.runners: dict[str, FakeRunner] = {}  # by model id
        self._options: dict[str, dict[str, Any]] = {FAKE_MODEL: runner_options}  # by path

        def factory(config: EngineConfig, *, progress: Any, on_fatal: Any) -> EngineWorker:
            worker, runner = make_worker(on_fatal=on_fatal, **self._options[config.model])
            self.runners[Path(config.model).name] = runner
            return worker

        self.host = EngineHost(EngineConfig(model=FAKE_MODEL), factory=factory)

    def load(self, folder: Path, **runner_options: Any) -> None:
        """Make one more model resident, which runs with these options."""
        self._options[str(folder)] = runner_options
        self.host.load(str(folder))

    @property
    def runner(self) -> FakeRunner:
        return self.runners[FAKE_MODEL]

    @property
    def worker(self) -> EngineWorker:
        return self.host.worker()


def html_of(at: AppTest) -> str:
    """All HTML that the page rendered."""
    return "\n".join(element.proto.body for element in at.main if element.type == "html")
