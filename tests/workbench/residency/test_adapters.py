"""Adapters served over a resident base: each stream is its solo run, names lead to the right one, refusals change nothing."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from engine.errors import EngineDeadError
from engine.request import FinishReason
from engine.sampling_params import SamplingParams
from engine.worker import EngineWorker
from workbench.adapter_worker import AdapterWorker
from workbench.host import EngineHost, HostPhase, ResidentInUseError

PROMPTS = [[20 + i, 40 + i, 60 + i, 7] for i in range(16)]
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
LONG = SamplingParams(max_tokens=300, temperature=0.0, ignore_eos=True)


def tokens(
    host: EngineHost, model: str | None, prompt: list[int], params: SamplingParams = GREEDY
) -> tuple[int, ...]:
    return host.worker(model).submit(prompt, params).result(120).token_ids


def test_eight_adapters_in_one_batch_answer_as_each_does_alone_and_as_if_it_were_merged(hosted: Any) -> None:
    host = hosted()
    alone = {None: tokens(host, None, PROMPTS[0])}
    for version in range(1, 9):
        resident = host.load(f"t/{version}")
        assert (resident.parent, resident.merged_because) == ("tiny-llama", "")
        alone[version] = tokens(host, f"t/{version}", PROMPTS[0])
    assert len(set(alone.values())) == 9, "every one must answer differently"
    assert len({id(host.worker(f"t/{v}").records) for v in range(1, 9)}) == 1, "one engine serves all"
    for params in (GREEDY, SamplingParams(max_tokens=24, temperature=1.0, seed=5, ignore_eos=True)):
        solo = {v: tokens(host, f"t/{v}" if v else None, PROMPTS[1], params) for v in alone}
        streams = {v: host.worker(f"t/{v}" if v else None).submit(PROMPTS[1], params) for v in alone}
        assert {v: stream.result(120).token_ids for v, stream in streams.items()} == solo
    merging = hosted(enable_lora=False)
    told = merging.load("t/3")
    assert told.parent is None
    assert "no adapters" in told.merged_because
    assert tokens(merging, "t/3", PROMPTS[0]) == alone[3]
