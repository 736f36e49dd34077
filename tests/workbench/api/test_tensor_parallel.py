"""A model over two processes: it answers as one process does, and a process that dies takes what ran on it, and nothing else."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.records import HealthState
from engine.request import FinishReason
from engine.sampling_params import SamplingParams
from engine.structured_outputs import StructuredOutputsParams
from workbench.host import load_worker

PLAIN = {"max_tokens": 16, "ignore_eos": True}
# Prompts of more than one step, two with the same beginning.
PROMPTS = [list(range(5, 45)), [*range(5, 37), 7, 8, 9], list(range(60, 95))]
PARAMS = [
    SamplingParams(**PLAIN, temperature=0.0, logprobs=3, prompt_logprobs=1),
    SamplingParams(**PLAIN, temperature=1.0, seed=4, top_p=0.9, min_p=0.01),
    SamplingParams(**PLAIN, temperature=1.2, seed=5, presence_penalty=0.6, repetition_penalty=1.3),
]
LETTERS = SamplingParams(
    max_tokens=24, temperature=1.0, seed=6, structured_outputs=StructuredOutputsParams(regex="[a-d]{12}")
)


def children() -> list[int]:
    """The processes of ranks that this one started."""
    mine = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, status = (folder / "cmdline").read_text(), (folder / "stat").read_text()
        except OSError:  # it has ended
            continue
        if (
            "engine.parallel.rank_process" in command
            and int(status.rpartition(")")[2].split()[1]) == os.getpid()
        ):
            mine.append(int(folder.name))
    return mine


def answers(worker: Any) -> list[Any]:
    """What all prompts get, side by side."""
    return [stream.result(60) for stream in worker.submit_all(PROMPTS, PARAMS)]


def serve_two(serve: Any, tiny_model: Path) -> Any:
    """A server whose default model runs on two processes, and every other one in this."""

    def factory(config: EngineConfig, **more: Any) -> Any:
        size = 2 if config.model == str(tiny_model) else 1
        return load_worker(replace(config, tensor_parallel_size=size), **more)

    # A pool of less than all of them need, steps shorter than a prompt.
    config = EngineConfig(
        model=str(tiny_model), dtype="float64", device="cpu", num_threads=1, block_size=4, num_blocks=26,
        max_batched_tokens=24, max_num_seqs=8, max_model_len=104, tensor_parallel_size=2,
    )  # fmt: skip
    return serve(factory, config), config


def test_two_processes_answer_as_one_until_one_is_killed(
    serve: Any, tiny_model: Path, other_model: Path, eventually: Callable[..., bool]
) -> None:
    running, config = serve_two(serve, tiny_model)
    alone = load_worker(
        replace(config, tensor_parallel_size=1), progress=lambda *_: None, on_fatal=lambda _: None
    )
    alone.start()
    expected = answers(alone)
    preemptions = alone.stats().preemptions
    alone.close()
    with running as server:
        found = answers(server.worker)
        assert [each.token_ids for each in found] == [each.token_ids for each in expected]
        assert server.worker.stats().preemptions == preemptions > 0
        # float64: sums over two parts are in another order.
        for ours, theirs in zip(found[0].logprobs, expected[0].logprobs, strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-9)
        other = server.host.load(str(other_model))
        there = server.host.worker(other.id)
        before = there.submit([5, 6, 7], SamplingParams(**PLAIN, temperature=0.0)).result(60).token_ids

        streams = [
            server.worker.submit([9, i], SamplingParams(max_tokens=90, ignore_eos=True)) for i in range(3)
        ]
        assert eventually(lambda: server.worker.stats().num_running == 3)
        (rank,) = children()
        os.kill(rank, signal.SIGKILL)
        for stream in streams:
            ended = stream.result(10)
            assert ended.finish_reason is FinishReason.ERROR
            assert "rank 1 of 2 was killed by SIGKILL" in (ended.error or "")
        assert eventually(lambda: server.http.get("/readyz").status_code == 503)
        assert "rank 1 of 2 was killed by SIGKILL" in server.http.get("/readyz").json()["message"]
        refused = server.post(max_tokens=4)
        assert refused.status_code == 503
        again = there.submit([5, 6, 7], SamplingParams(**PLAIN, temperature=0.0)).result(60)
        assert (again.token_ids, there.health().state) == (before, HealthState.HEALTHY)
    assert children() == []


@pytest.mark.full
def test_a_model_whose_process_died_can_be_loaded_again(
    serve: Any, tiny_model: Path, eventually: Callable[..., bool]
) -> None:
    running, _ = serve_two(serve, tiny_model)
    with running as server:
        letters = server.worker.submit([5, 6], LETTERS).result(60).text
        assert len(letters) == 12
        assert set(letters) <= set("abcd")
        before = [each.token_ids for each in answers(server.worker)]
        first = children()
        os.kill(first[0], signal.SIGKILL)
        assert eventually(lambda: server.http.get("/readyz").status_code == 503)
        server.host.load(str(tiny_model), as_default=True)
        assert server.http.get("/readyz").status_code == 200
        assert [each.token_ids for each in answers(server.worker)] == before
        assert server.worker.submit([5, 6], LETTERS).result(60).text == letters
        assert len(children()) == 1
        assert children() != first
    assert children() == []
