"""Adapters served over a resident base: each stream is its solo run, names lead to the right one, refusals change nothing."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ConfigError, CorruptWeightsError, EngineDeadError, UnsupportedAdapterError
from engine.sampling_params import SamplingParams
from engine.worker import EngineWorker
from workbench.adapter_worker import AdapterWorker
from workbench.host import EngineHost, ResidentInUseError
from workbench.load_options import LoadOptions
from workbench.versions.errors import AdapterError, WrongBaseError

PROMPTS = [[20 + i, 40 + i, 60 + i, 7] for i in range(16)]
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
LONG = SamplingParams(max_tokens=250, temperature=0.0, ignore_eos=True)


def tokens(
    host: EngineHost, model: str | None, prompt: list[int] = PROMPTS[0], params: SamplingParams = GREEDY
) -> tuple[int, ...]:
    completion = host.worker(model).submit(prompt, params).result(120)
    assert completion.error is None
    return completion.token_ids


def test_eight_adapters_in_one_batch_answer_as_each_does_alone(host: EngineHost) -> None:
    models: list[str | None] = [None, *(host.load(f"t/{version}").id for version in range(1, 9))]
    assert {resident.parent for resident in host.resident()} == {None, "tiny-llama"}
    assert len({id(host.worker(model).records) for model in models}) == 1, "one engine serves all"
    for params in (GREEDY, SamplingParams(max_tokens=24, temperature=1.0, seed=5, ignore_eos=True)):
        solo = [tokens(host, model, params=params) for model in models]
        assert len(set(solo)) == 9, "every one must answer differently"
        streams = [host.worker(model).submit(PROMPTS[0], params) for model in models]
        assert [stream.result(120).token_ids for stream in streams] == solo


def test_an_adapter_with_options_is_served_by_a_base_that_has_them(host: EngineHost) -> None:
    plain, short = host.load("t/1"), host.load("t/1", options=LoadOptions(max_model_len=128))
    assert (short.id, short.parent) == ("t/1#128-tokens", "tiny-llama#128-tokens")
    assert host.find(short.parent).adapters == (short.id,)
    assert host.worker(short.id).config.max_model_len == 128
    assert tokens(host, short.id) == tokens(host, plain.id)
    with pytest.raises(ConfigError, match="1024 is the most") as refused:
        host.load("t/2", options=LoadOptions(max_model_len=4096))
    assert (refused.value.value, refused.value.limit) == (4096, 1024)
    host.unload(short.id)
    assert [each.id for each in host.resident()] == ["tiny-llama", "t/1"], "its base goes with it"


def test_every_name_of_a_version_reaches_its_adapter(host: EngineHost) -> None:
    host.load("t@champion")
    told = tokens(host, "t/1")
    for name in ("t@champion", "models:/t@champion", "models:/t/1", "t:1"):
        assert tokens(host, name) == told != tokens(host, None)
    assert host.models()[1].title == "t v1"


def test_an_alias_moves_between_adapters_while_streams_run(host: EngineHost, eventually: Any) -> None:
    host.follow("t@champion")
    host.serve("t@champion", 1)
    solo = [tokens(host, "t@champion", prompt, LONG) for prompt in PROMPTS[:4]]
    old = host.worker("t@champion")
    running = [old.submit(prompt, LONG) for prompt in PROMPTS[:4]]
    assert eventually(lambda: all(stream.drain() > 0 for stream in running))
    host.serve("t@champion", 2)
    assert old.num_live == 4, "they were running when the alias had moved"
    assert tokens(host, "t@champion") == tokens(host, "t/2") != solo[0][:24]
    assert [stream.result(120).token_ids for stream in running] == solo
    assert eventually(lambda: not host.draining())
    with pytest.raises(EngineDeadError):
        old.submit([1, 2], GREEDY)
    assert [lora.name for lora in host.worker().loras] == [host.worker("t/2").lora]


def test_what_cannot_be_served_is_refused_and_running_requests_go_on(
    host: EngineHost, adapter: Any, tmp_path: Path
) -> None:
    host.load("t/1")
    solo = tokens(host, "t/1", params=LONG)
    running = host.worker("t/1").submit(PROMPTS[0], LONG)
    truncated, infinite = adapter(tmp_path / "truncated", 9), adapter(tmp_path / "infinite", 9)
    for folder, spoilt in (
        (truncated, lambda raw: raw[:-100]),
        (infinite, lambda raw: raw[:-4] + b"\x00\x00\x80\x7f"),
    ):
        weights = folder / "adapter_model.safetensors"
        weights.write_bytes(spoilt(weights.read_bytes()))
    cases = [
        (adapter(tmp_path / "rank", 9, rank=17), UnsupportedAdapterError, "rank 17 is beyond max_lora_rank 16"),
        (adapter(tmp_path / "base", 9, base_digest="0" * 64), WrongBaseError, "was trained on base 0000"),
        (adapter(tmp_path / "dora", 9, use_dora=True), AdapterError, "use_dora"),
        (truncated, AdapterError, "not a whole safetensors file"),
        (infinite, CorruptWeightsError, "not finite"),
    ]  # fmt: skip
    for folder, error, told in cases:
        with pytest.raises(error, match=told):
            host.load_adapter("broken", str(folder))
        assert [r.id for r in host.resident()] == ["tiny-llama", "t/1"]
    assert running.result(120).token_ids == solo


def test_an_adapter_that_engines_cannot_serve_is_merged_and_says_why(
    host: EngineHost, versions: Any, adapter: Any, tmp_path: Path
) -> None:
    versions.folders[1] = adapter(tmp_path / "large", 9, rank=20)
    resident = host.load("t/1")
    assert resident.parent is None
    assert "rank 20 is beyond max_lora_rank 16" in resident.merged_because
    assert tokens(host, "t/1") != tokens(host, None)
    versions.folders[2] = adapter(tmp_path / "rs", 9, rank=20, use_rslora=True)
    with pytest.raises(AdapterError, match="use_rslora"):
        host.load("t/2")


def test_an_rslora_adapter_is_served_over_its_base(
    host: EngineHost, versions: Any, adapter: Any, tmp_path: Path
) -> None:
    versions.folders[1] = adapter(tmp_path / "plain", 9)
    versions.folders[2] = adapter(tmp_path / "rs", 9, use_rslora=True)
    assert host.load("t/1").parent == host.load("t/2").parent == "tiny-llama"
    assert tokens(host, "t/1") != tokens(host, "t/2")


def test_an_adapter_answers_as_its_merged_weights_do_and_says_which_it_is(hosted: Any) -> None:
    exact = {"dtype": "float64", "deterministic": False}
    with hosted(**exact) as over, hosted(**exact, enable_lora=False) as merging:
        adapter, merged = over.load("t/3"), merging.load("t/3")
        assert (adapter.parent, adapter.merged_because) == ("tiny-llama", "")
        assert merged.parent is None
        assert "take no adapters" in merged.merged_because
        assert adapter.digest == merged.digest
        assert over.worker("t/3").config.version_digest == adapter.digest
        assert tokens(over, "t/3") == tokens(merging, "t/3") != tokens(over, None)


def test_a_deterministic_engine_of_its_own_serves_adapters_for_comparisons(hosted: Any) -> None:
    with hosted(deterministic=False) as host:
        one, two = (host.load(f"t/{version}", deterministic=True, hold=True) for version in (1, 2))
        assert one.parent == two.parent == "tiny-llama#deterministic"
        assert host.worker(one.id).stats().is_proven_deterministic
        host.load("t/1")
        assert host.find("t/1").parent == "tiny-llama"
        host.release(one.id)
        assert host.find(two.id).parent == "tiny-llama#deterministic", "its base stays while it is needed"
        with pytest.raises(ResidentInUseError, match="serves t/2"):
            host.unload("tiny-llama#deterministic")
        host.release(two.id)
        assert [r.id for r in host.resident()] == ["tiny-llama", "t/1"]


def test_an_adapter_can_be_the_default_model_over_a_base_that_comes_with_it(hosted: Any) -> None:
    with hosted("t@champion") as host:
        assert [(r.id, r.parent, r.is_default) for r in host.resident()] == [
            ("t/1", "tiny-llama", True), ("tiny-llama", None, False),
        ]  # fmt: skip
        assert tokens(host, None) == tokens(host, "t/1") != tokens(host, "tiny-llama")


def test_a_worker_of_an_adapter_has_every_public_member_of_a_worker() -> None:
    """It has none of the state that inherited ones would need."""
    public = {name for name, _ in inspect.getmembers(EngineWorker) if not name.startswith("_")} - {"lora"}
    assert public <= set(vars(AdapterWorker))
