"""An engine on a FakeRunner, and how to run it to the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from engine.config import EngineConfig
from engine.engine import Engine, StepOutput
from engine.fake_runner import FakeRunner, FakeTokenizer
from engine.plan import KVSpec
from engine.records import RequestRecord, StepRecord, StreamDelta
from engine.sampling_params import SamplingParams


@dataclass
class Rig:
    """An engine, its runner, and all that came out of it."""

    engine: Engine
    runner: FakeRunner
    deltas: dict[str, list[StreamDelta]] = field(default_factory=dict)
    steps: list[StepRecord] = field(default_factory=list)
    requests: dict[str, RequestRecord] = field(default_factory=dict)

    def add(self, name: str, prompt: list[int] | str, **params: object) -> None:
        prompt = self.engine.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        self.engine.add(self.engine.make_request(prompt, SamplingParams(**params), request_id=name))

    def step(self) -> StepOutput:
        output = self.engine.step()
        for delta in output.deltas:
            self.deltas.setdefault(delta.request_id, []).append(delta)
        if output.record is not None:
            self.steps.append(output.record)
        self.requests.update((record.request_id, record) for record in output.requests)
        self.engine.check_integrity()
        assert not self.runner.violations, self.runner.violations
        return output

    def run(self) -> None:
        for _ in range(10_000):
            if not self.engine.has_work:
                return
            self.step()
        raise AssertionError("the engine does not come to an end")

    def tokens(self, name: str) -> list[int]:
        return [token for delta in self.deltas.get(name, []) for token in delta.token_ids]

    def text(self, name: str) -> str:
        return "".join(delta.text or "" for delta in self.deltas.get(name, []))

    def last(self, name: str) -> StreamDelta:
        return self.deltas[name][-1]


@pytest.fixture
def make_rig() -> Callable[..., Rig]:
    """Builds a Rig; keyword arguments are EngineConfig's, and `runner` holds FakeRunner's."""

    def make(
        *, runner: dict[str, object] | None = None, with_tokenizer: bool = True, **config: object
    ) -> Rig:
        settings = {
            "model": "fake",
            "num_blocks": 256,
            "block_size": 16,
            "max_batched_tokens": 512,
            "max_num_seqs": 16,
            "max_model_len": 1024,
            **config,
        }
        fake = FakeRunner(settings["num_blocks"], settings["block_size"], **(runner or {}))
        tokenizer = FakeTokenizer()
        engine = Engine(
            EngineConfig(**settings),
            fake,
            kv_spec=KVSpec(1, 1, 8, settings["block_size"], 4),
            eos_token_ids=tokenizer.eos_token_ids,
            vocab_size=tokenizer.vocab_size,
            tokenizer=tokenizer if with_tokenizer else None,
        )
        return Rig(engine, fake)

    return make
