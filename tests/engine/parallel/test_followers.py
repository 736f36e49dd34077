"""A follower keeps up with rows on a device too, two steps in flight: ranks as threads, and the row buffers of a GPU on the CPU."""

from __future__ import annotations

from pathlib import Path
from queue import SimpleQueue
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.attention.reference import ReferenceAttention
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import EngineError, OutOfMemoryError
from engine.memory import make_kv_spec
from engine.models.decoder import Decoder
from engine.models.shard import Shard, shard_of
from engine.models.transformers_config import read_model_config
from engine.models.weights import load_weights
from engine.parallel.messages import for_followers
from engine.parallel.runner import FollowerRunner, TensorParallelRunner
from engine.plan import StepPlan
from engine.runner.model_runner import ModelRunner
from engine.sampling_params import SamplingParams
from tests.engine.models.conftest import make_tiny, random_prompt

CPU = torch.device("cpu")


class Meeting:
    """Where two threads meet for their collectives."""

    def __init__(self) -> None:
        self.barrier, self.parts = Barrier(2, timeout=20), [torch.empty(0)] * 2


class ThreadRanks:
    """What runners use of ``engine.parallel.ranks.Ranks``."""

    def __init__(self, shard: Shard, meeting: Meeting) -> None:
        self.shard, self.rank, self._meeting = shard, shard.rank, meeting

    def all_reduce(self, x: Tensor) -> Tensor:
        return x.copy_(self._exchange(x).sum(0))

    def from_first(self, x: Tensor) -> Tensor:
        return x.copy_(self._exchange(x)[0])

    def close(self) -> None:
        pass

    def _exchange(self, x: Tensor) -> Tensor:
        self._meeting.parts[self.rank] = x
        self._meeting.barrier.wait()
        both = torch.stack(self._meeting.parts)
        self._meeting.barrier.wait()
        return both


class Leader:
    """A runner whose steps a follower in another thread runs too."""

    def __init__(self, runner: ModelRunner, follower: FollowerRunner) -> None:
        self._runner, self._plans = runner, SimpleQueue[StepPlan | None]()
        self.max_inflight = runner.max_inflight
        self._thread = Thread(target=self._follow, args=(follower,))
        self._thread.start()

    def submit(self, plan: StepPlan) -> None:
        self._plans.put(for_followers(plan))
        self._runner.submit(plan)

    def collect(self) -> Any:
        return self._runner.collect()

    def close(self) -> None:
        self._plans.put(None)
        self._thread.join(20)
        self._runner.close()

    def _follow(self, follower: FollowerRunner) -> None:
        while (plan := self._plans.get()) is not None:
            follower.step(plan)
        follower.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("llama")
    make_tiny("llama3_gqa_tied", made)
    return made


def runner_of(folder: Path, config: EngineConfig, shard: Shard, meeting: Meeting) -> tuple[ModelRunner, Any]:
    decoder = Decoder(shard.share, dtype=torch.float64, device=CPU, max_positions=64, shard=shard)
    load_weights(decoder, folder)
    ranks: Any = ThreadRanks(shard, meeting) if shard.size > 1 else None
    if ranks is not None:
        decoder.sum_over(ranks.all_reduce)
    runner = ModelRunner(
        decoder, ReferenceAttention(), config=config, kv_spec=make_kv_spec(shard.share, config.block_size, torch.float64),
        eos_token_ids=frozenset(), device=CPU, dtype=torch.float64, ranks=ranks,
        replay=lambda key, work: None,  # rows as on a GPU; with enforce_eager nothing is captured
    )  # fmt: skip
    return runner, ranks


def tokens_of(folder: Path, size: int) -> dict[str, list[int]]:
    """What an engine of so many ranks gives to three requests that do not all fit at once."""
    config = EngineConfig(
        model=str(folder), dtype="float64", device="cpu", num_blocks=16, block_size=4, max_num_seqs=4, max_model_len=64,
        max_batched_tokens=16, attention_backend="reference", enforce_eager=True,
    )  # fmt: skip
    model, meeting = read_model_config(folder), Meeting()
    runner, _ = runner_of(folder, config, shard_of(model, 0, size), meeting)
    leading: Any = runner
    if size > 1:
        leading = Leader(
            runner, FollowerRunner(*runner_of(folder, config, shard_of(model, 1, size), meeting))
        )
    engine = Engine(
        config, leading, kv_spec=make_kv_spec(model, 4, torch.float64), eos_token_ids=frozenset(), vocab_size=model.vocab_size,
    )  # fmt: skip
    assert engine._max_inflight == 2
    found: dict[str, list[int]] = {}
    try:
        for i in range(3):
            params = SamplingParams(
                max_tokens=12, temperature=0.5 * i, seed=i, frequency_penalty=0.3 * i, top_k=30
            )
            engine.add(engine.make_request(random_prompt(10 + 7 * i, i), params, request_id=str(i)))
        while engine.has_work:
            output = engine.step()
            assert output.record is None or output.record.error is None
            for delta in output.deltas:
                found.setdefault(delta.request_id, []).extend(delta.token_ids)
        assert engine.stats().preemptions > 0
    finally:
        engine.close()
    return found


@pytest.mark.full
def test_two_ranks_with_rows_on_a_device_choose_what_one_does(folder: Path) -> None:
    found = tokens_of(folder, 2)
    assert found == tokens_of(folder, 1)
    assert {len(tokens) for tokens in found.values()} == {12}


class ScriptedProcesses:
    """Rank 1 as a script: how it answers, in order."""

    def __init__(self, *answers: EngineError | None) -> None:
        self._answers, self.said, self.on_lost = list(answers), [], None

    def send(self, message: object) -> None:
        self.said.append(message)

    def await_all(self) -> None:
        answer = self._answers.pop(0)
        if answer is not None:
            raise answer


class SleepingRunner:
    """Rank 0's own runner, as far as sleep goes."""

    def __init__(self, failure: EngineError | None = None) -> None:
        self.is_asleep, self._failure = False, failure

    def sleep(self, level: int) -> None:
        assert not self.is_asleep
        self.is_asleep = True

    def wake_up(self) -> None:
        assert self.is_asleep
        if self._failure is not None:
            raise self._failure
        self.is_asleep = False


@pytest.mark.parametrize("who", ["the first", "another"])
def test_where_one_rank_cannot_wake_up_all_sleep_on(who: str) -> None:
    full = OutOfMemoryError("no memory is left")
    processes = ScriptedProcesses(None, full if who == "another" else None, None)
    own = SleepingRunner(full if who == "the first" else None)
    anything: Any = None
    runner = TensorParallelRunner(own, anything, processes)  # type: ignore[arg-type]
    runner.sleep(2)
    with pytest.raises(OutOfMemoryError):
        runner.wake_up()
    assert own.is_asleep
    assert [message.level for message in processes.said] == [2, 0, 2]
