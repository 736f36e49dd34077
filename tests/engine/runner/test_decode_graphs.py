"""Captured decode steps, without a GPU: what they may not do, and that they give the same tokens.

A CUDA graph replays its launches with the addresses of its recording and asks the host nothing. `GuardedReplay` does the
captured work anew each time, on a CPU, and fails where a graph would have gone wrong: a value read by the host, a shape that
depends on data, or memory from outside of the work at another address than when it was captured.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.attention.reference import ReferenceAttention
from engine.build import prepare_decoder
from engine.config import EngineConfig
from engine.engine import Engine
from engine.fake_tokenizer import FakeTokenizer
from engine.kernels.kv_quantization import cache_dtype
from engine.kernels.lora import tokens_by_slot
from engine.memory import DeviceMemory, make_kv_spec, torch_dtype
from engine.models.decoder import Decoder
from engine.records import StepRecord
from engine.request import FinishReason
from engine.runner import device_batch
from engine.runner.decode_graphs import captured_sizes
from engine.runner.draft import DraftModel
from engine.runner.model_runner import ModelRunner, allocate_caches
from engine.runner.profile_run import measure_steps
from engine.sampling_params import SamplingParams
from engine.structured_outputs import StructuredOutputsParams

ASKS_THE_HOST = {
    "aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal", "aten::nonzero", "aten::masked_select",
    "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::repeat_interleave.Tensor",
    "aten::_pin_memory",
}  # fmt: skip

DIGITS = StructuredOutputsParams(
    regex="[0-9]{2,20}(-[0-9]{2,9})*"
)  # of FakeTokenizer's bytes, the model has the first 61


class Refused(Exception):
    """The work could not be captured."""


class CaptureGuard(TorchDispatchMode):
    """Runs operations and notes the addresses that they take from outside of the work."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: set[int] = set()
        self._made: dict[
            int, Tensor
        ] = {}  # kept: an address that is freed could come again as somebody else's

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = (
            op._schema.name
            if op._overloadname in ("", "default")
            else f"{op._schema.name}.{op._overloadname}"
        )
        if name in ASKS_THE_HOST or op._schema.name in ASKS_THE_HOST:
            raise Refused(f"{name} waits for the device, or its shape depends on data")
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if op._schema.name == "aten::lift_fresh":
            if given[0].ndim:
                raise Refused("values of the host become a tensor: a copy to the device")
            self._made[given[0].untyped_storage().data_ptr()] = given[0]  # a constant goes with the launch
        if op._schema.name.startswith("aten::index") and any(x.dtype == torch.bool for x in given[1:]):
            raise Refused(f"{name} with a mask: the shape depends on data")
        for tensor in given:
            address = tensor.untyped_storage().data_ptr()
            if address and address not in self._made:
                self.taken.add(tensor.data_ptr())
        outputs = op(*args, **(kwargs or {}))
        known = {tensor.untyped_storage().data_ptr() for tensor in given}
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self._made[tensor.untyped_storage().data_ptr()] = tensor
        return outputs


class GuardedReplay:
    """Implements ``engine.runner.decode_graphs.Replay``."""

    def __init__(self) -> None:
        self.addresses: dict[Hashable, set[int]] = {}
        self.captured: set[Any] = set()  # also after the end
        self.num_replays = 0

    def __call__(self, key: Hashable, work: Callable[[], None]) -> None:
        if key not in self.addresses:
            work()  # as CudaGraphs does before it captures
            self.captured.add(key)
        with CaptureGuard() as guard:
            work()
        if key in self.addresses:
            self.num_replays += 1
            moved = guard.taken ^ self.addresses[key]
            if moved:
                raise Refused(f"{len(moved)} addresses differ from those that {key} was captured with")
        self.addresses[key] = guard.taken

    def close(self) -> None:
        self.addresses.clear()


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: x[x > 0],
        lambda x: torch.nonzero(x),
        lambda x: x + torch.tensor([1.0, 2.0, 3.0]),
        lambda x: torch.repeat_interleave(x, torch.ones(3, dtype=torch.int64)),
    ],
)
def test_the_guard_refuses_what_a_graph_cannot_hold(work: Callable[[Tensor], Any]) -> None:
    x = torch.tensor([1.0, -2.0, 3.0])
    with pytest.raises(Refused):
        GuardedReplay()("work", lambda: work(x))


def test_the_guard_refuses_memory_that_moved() -> None:
    replay, held = GuardedReplay(), [torch.ones(3)]
    replay("work", lambda: held[0].mul_(2))
    replay("work", lambda: held[0].mul_(2))
    held.append(held[0].clone())
    with pytest.raises(Refused, match="differ"):
        replay("work", lambda: held[1].mul_(2))


def test_tokens_are_listed_by_adapter_slot_as_a_graph_can_hold_it() -> None:
    replay, row_slots, rows = GuardedReplay(), torch.tensor([1, -1, 0]), torch.tensor([0, 2, 1, 1])
    found = []
    for _ in range(2):
        replay("work", lambda: found.append(tokens_by_slot(row_slots[rows], 2)))
        rows.copy_(torch.tensor([2, 0, 0, 1]))
    listed = [(each.order.tolist(), each.starts.tolist()) for each in found]
    # Captured work runs once before it is captured.
    assert listed == [([2, 3, 1, 0], [2, 3, 4])] * 2 + [([3, 0, 1, 2], [1, 2, 4])]


def test_sizes_are_powers_of_two_that_hold_all_rows() -> None:
    assert captured_sizes(1) == (1,)
    assert captured_sizes(48) == (1, 2, 4, 8, 16, 32, 64)
    assert captured_sizes(1024) == (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class MeasuredReplay(GuardedReplay):
    """Also an ``Allocator`` whose graphs take a MiB each, and in which a step's own memory is none."""

    def reset_peak(self) -> None: ...

    def held_bytes(self) -> int:
        return 0

    peak_bytes = held_bytes

    def memory(self) -> DeviceMemory:
        return DeviceMemory(0, 0)

    def graph_bytes(self) -> int:
        return len(self.addresses) << 20


def test_the_profile_run_captures_the_largest_size_alone_and_gives_it_back(
    make_runner: Callable[..., ModelRunner], tiny_decoder: Callable[..., Decoder]
) -> None:
    captured, replay = set(), MeasuredReplay()
    config = EngineConfig(
        model="tiny", dtype="float64", num_blocks=24, block_size=4, max_num_seqs=4, max_model_len=40,
        max_batched_tokens=64,
    )  # fmt: skip

    def make(config: EngineConfig) -> ModelRunner:
        runner = make_runner(replay=replay)
        close = runner.close

        def note_and_close() -> None:
            captured.update(key[1] for key in replay.addresses)
            close()

        runner.close = note_and_close  # type: ignore[method-assign]
        return runner

    kv_spec = make_kv_spec(tiny_decoder().config, 4, torch.float64)
    found = measure_steps(make, config, kv_spec, replay, tiny_decoder().config.vocab_size)
    assert captured == {4}
    assert found.graphs_bytes == 3 << 20, "one forward pass, two samplers"
    assert replay.addresses == {}


@dataclass
class Ran:
    """What came out of an engine."""

    tokens: dict[str, list[int]] = field(default_factory=dict)
    logprobs: dict[str, list[float]] = field(default_factory=dict)
    records: list[StepRecord] = field(default_factory=list)
    reasons: dict[str, FinishReason] = field(default_factory=dict)

    @property
    def graph_sizes(self) -> set[int]:
        return {record.graph_size for record in self.records if record.rows}


@dataclass(frozen=True)
class Asked:
    """One request of the workload."""

    prompt: list[int]
    params: SamplingParams
    arrives: int = 0  # step before which it is added
    aborted_after: int | None = None  # tokens delivered


def workload() -> dict[str, Asked]:
    """Requests of all kinds that meet in one small pool."""
    generator = torch.Generator().manual_seed(5)

    def tokens(n: int) -> list[int]:
        return torch.randint(0, 59, (n,), generator=generator).tolist()

    shared = tokens(9)
    drawn: dict[str, Any] = {"temperature": 0.8, "ignore_eos": True}
    return {
        "greedy": Asked(tokens(7), SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True)),
        "figures": Asked(tokens(3), SamplingParams(max_tokens=34, temperature=0.0, ignore_eos=True, logprobs=2)),
        "drawn": Asked([*shared, 1], SamplingParams(max_tokens=16, seed=3, typical_p=0.6, logprobs=1, **drawn), 2),
        "filtered": Asked([*shared, 2], SamplingParams(max_tokens=16, seed=4, top_k=9, top_p=0.8, min_p=0.02, **drawn), 5),
        "stops": Asked(tokens(5), SamplingParams(max_tokens=25, seed=2**40 + 7, temperature=1.0,
                                                 stop_token_ids=tuple(range(12))), arrives=3),
        "later": Asked(tokens(4), SamplingParams(max_tokens=18, seed=9, temperature=1.0, min_tokens=9,
                                                 stop_token_ids=tuple(range(20))), arrives=6),
        "leaves": Asked(tokens(6), SamplingParams(max_tokens=25, seed=6, **drawn), aborted_after=5),
        "prompt": Asked(tokens(6), SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True, prompt_logprobs=0), 9),
        "penalized": Asked([*shared, 3], SamplingParams(max_tokens=22, seed=11, presence_penalty=1.5, frequency_penalty=2.0,
                                                        repetition_penalty=1.6, **drawn), arrives=1),
        "biased": Asked(tokens(5), SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True, repetition_penalty=1.7,
                                                  logit_bias={3: 4.5, 7: -100.0, 11: 3.0}, logprobs=1), arrives=3),
        "limited": Asked(tokens(4), SamplingParams(max_tokens=20, seed=12, allowed_token_ids=(0, 3, 6, 9),
                                                   bad_words=((0,), (3, 6), (9, 9), (6, 3, 3)), **drawn), arrives=5),
        "follows": Asked(tokens(5), SamplingParams(max_tokens=24, seed=21, temperature=1.3, logprobs=1,
                                                   structured_outputs=DIGITS), arrives=2),
        "follows more": Asked([*shared, 4], SamplingParams(max_tokens=20, seed=22, temperature=1.3, frequency_penalty=1.0,
                                                           allowed_token_ids=(48, 49, 50, 60), bad_words=((49, 50),), min_tokens=6,
                                                           structured_outputs=DIGITS), arrives=4),
        "long": Asked(tokens(24), SamplingParams(max_tokens=10, seed=8, **drawn), arrives=4),
    }  # fmt: skip


@pytest.fixture(scope="module")
def run(tiny_decoder: Callable[..., Decoder]) -> Callable[..., Ran]:
    """``run(requests, replay=None, **engine settings)``: to the end of all of them, on a CPU."""

    def run(requests: dict[str, Asked], replay: Any = None, **settings: Any) -> Ran:
        values: dict[str, Any] = {
            "model": "tiny", "dtype": "float64", "device": "cpu", "num_blocks": 24, "block_size": 4, "max_num_seqs": 6,
            "max_model_len": 40, "max_batched_tokens": 16, "attention_backend": "reference", **settings,
        }  # fmt: skip
        config = EngineConfig(**values)
        dtype = torch_dtype(config)
        decoder = tiny_decoder(dtype)
        stored = cache_dtype(config.kv_cache_dtype, dtype)
        kv_spec = make_kv_spec(decoder.config, config.block_size, stored)
        draft = None
        if config.speculative_config is not None:  # the same weights guess
            draft = DraftModel(
                tiny_decoder(dtype), ReferenceAttention(), kv_spec=kv_spec, load_decoder=lambda: tiny_decoder(dtype),
                make_caches=lambda: allocate_caches(kv_spec, config.num_blocks or 0, stored, torch.device("cpu")),
            )  # fmt: skip
        runner = ModelRunner(
            prepare_decoder(decoder, config), ReferenceAttention(deterministic=config.deterministic), config=config, kv_spec=kv_spec,
            eos_token_ids=frozenset({60}), device=torch.device("cpu"), dtype=dtype, replay=replay, draft=draft,
        )  # fmt: skip
        runner.capture()
        engine = Engine(
            config,
            runner,
            kv_spec=kv_spec,
            eos_token_ids=frozenset({60}),
            vocab_size=decoder.config.vocab_size,
            tokenizer=FakeTokenizer(),
        )
        ran, waiting, step = Ran(), dict(requests), 0
        while waiting or engine.has_work:
            for name in [n for n, asked in waiting.items() if asked.arrives <= step]:
                asked = waiting.pop(name)
                engine.add(engine.make_request(asked.prompt, asked.params, request_id=name))
            output, step = engine.step(), step + 1
            for delta in output.deltas:
                assert delta.error is None, delta.error
                got = ran.tokens.setdefault(delta.request_id, [])
                got.extend(delta.token_ids)
                ran.logprobs.setdefault(delta.request_id, []).extend(e.logprob for e in delta.logprobs)
                if delta.finish_reason is not None:
                    ran.reasons[delta.request_id] = delta.finish_reason
                limit = requests[delta.request_id].aborted_after
                if limit is not None and len(got) >= limit:
                    engine.abort(delta.request_id)
            if output.record is not None:
                assert output.record.error is None, output.record.error
                ran.records.append(output.record)
            engine.check_integrity()
            assert step < 2000, "the engine makes no progress"
        engine.close()
        return ran

    return run


def assert_same(requests: dict[str, Asked], found: Ran, expected: Ran) -> None:
    assert found.tokens.keys() == requests.keys()
    for name, tokens in expected.tokens.items():
        if requests[name].aborted_after is None:
            assert found.tokens[name] == tokens, name
            assert found.logprobs[name] == pytest.approx(expected.logprobs[name], abs=1e-5), name
            assert found.reasons[name] == expected.reasons[name], name
        else:
            assert found.reasons[name] is FinishReason.ABORT
            assert found.tokens[name] == tokens[: len(found.tokens[name])], name


@pytest.fixture(scope="module")
def alone(run: Callable[..., Ran]) -> Ran:
    """What each request answers when it has the engine to itself, and no step is captured or overlaps."""
    everything = Ran()
    for name, asked in workload().items():
        ran = run({name: Asked(asked.prompt, asked.params)})
        assert ran.graph_sizes == {0}
        everything.tokens |= ran.tokens
        everything.logprobs |= ran.logprobs
        everything.reasons |= ran.reasons
    return everything


@pytest.mark.parametrize("num_blocks", [60, 20], ids=["roomy", "preempting"])
@pytest.mark.parametrize("async_scheduling", [True, False], ids=["overlapped", "one by one"])
@pytest.mark.parametrize("enforce_eager", [False, True], ids=["captured", "eager"])
def test_late_results_and_captured_steps_give_the_same_tokens(
    run: Callable[..., Ran], alone: Ran, num_blocks: int, async_scheduling: bool, enforce_eager: bool
) -> None:
    replay, requests = GuardedReplay(), workload()
    ran = run(
        requests,
        replay,
        num_blocks=num_blocks,
        async_scheduling=async_scheduling,
        enforce_eager=enforce_eager,
    )
    assert_same(requests, ran, alone)
    assert bool({name for r in ran.records for name in r.preempted}) == (num_blocks == 20)
    assert any(record.prefix_hits for record in ran.records)
    if enforce_eager:
        assert ran.graph_sizes == {0}
    else:
        assert ran.graph_sizes >= {0, 1, 4}
        assert replay.num_replays >= 10
    assert {ran.reasons["stops"], ran.reasons["later"]} == {FinishReason.STOP}
    if not enforce_eager:
        sizes = {key[1] for key in replay.captured if key[0] == "sampler" and key[3]}
        assert len(sizes) >= 2, "rows with controls decode in captured steps too"
        assert any(key[4] for key in replay.captured if key[0] == "sampler"), "and so do rows with typical_p"


@pytest.mark.full
def test_a_draft_model_guesses_in_device_rows(run: Callable[..., Ran], alone: Ran) -> None:
    """Beside captured steps, in a pool that is too small for all; the same weights guess nearly everything rightly."""
    replay, requests = GuardedReplay(), workload()
    guessing = {"method": "draft_model", "model": "tiny", "num_speculative_tokens": 3, "min_gain": 0}
    ran = run(requests, replay, num_blocks=20, speculative_config=guessing)
    assert_same(requests, ran, alone)
    guessed = sum(record.num_draft_tokens for record in ran.records)
    assert 0.9 * guessed < sum(record.num_accepted_tokens for record in ran.records)
    assert any(record.preempted for record in ran.records)
    assert max(ran.graph_sizes) > 0


@pytest.mark.parametrize("stored", ["int8", pytest.param("fp8", marks=pytest.mark.full)])
def test_a_quantized_cache_is_captured_like_any_other(
    run: Callable[..., Ran], alone: Ran, stored: str
) -> None:
    requests, replay = workload(), GuardedReplay()
    requests = {name: requests[name] for name in ("greedy", "figures", "drawn", "filtered", "long")}
    expected = Ran()
    for name, asked in requests.items():
        ran = run({name: Asked(asked.prompt, asked.params)}, kv_cache_dtype=stored)
        expected.tokens |= ran.tokens
        expected.logprobs |= ran.logprobs
        expected.reasons |= ran.reasons
    ran = run(requests, replay, num_blocks=20, kv_cache_dtype=stored)
    assert_same(requests, ran, expected)
    assert ran.graph_sizes >= {0, 1, 2, 4}
    assert replay.num_replays >= 10
    assert any(record.preempted for record in ran.records)
    assert any(record.prefix_hits for record in ran.records)
    assert (
        max(abs(a - b) for a, b in zip(ran.logprobs["figures"], alone.logprobs["figures"], strict=True))
        > 1e-4
    )


@pytest.mark.parametrize("level", [1, 2])
def test_waking_up_captures_anew_and_gives_the_same_tokens(
    tiny_decoder: Callable[..., Decoder], make_runner: Callable[..., ModelRunner], plans: Any, level: int
) -> None:
    replay = GuardedReplay()
    runner = make_runner(replay=replay, load_decoder=tiny_decoder)
    runner.capture()

    def tokens(step_id: int) -> list[int]:
        """A prompt and four decode steps, the last three of them captured."""
        found = []
        admitted = [plans.admit(0, [3, 1, 4, 1, 5], [2, 7, 9], num_prompt=5)]
        for step in range(5):
            row = (0, 0, 5) if step == 0 else (0, 4 + step, 1)
            plan = plans.plan_of(step_id + step, [row], samples=[0], admitted=admitted if step == 0 else [],
                                 finished=[])  # fmt: skip
            runner.submit(plan)
            result = runner.collect()
            assert result.graph_size == (1 if step else 0)
            found += result.token_ids
        return found

    before, captured = tokens(0), set(replay.addresses)
    runner.sleep(level)
    assert not replay.addresses, "captured work holds addresses that are no more"
    runner.wake_up()
    assert set(replay.addresses) == captured
    num_replays = replay.num_replays
    assert tokens(10) == before
    assert replay.num_replays > num_replays
    runner.close()


@pytest.mark.full
def test_blocks_that_return_from_the_host_give_the_same_tokens(run: Callable[..., Ran], alone: Ran) -> None:
    """Copies are made beside the captured work, which finds everything where it was."""
    replay, requests = GuardedReplay(), workload()
    ran = run(requests, replay, num_blocks=20, swap_space_bytes=1 << 20)
    assert_same(requests, ran, alone)
    assert ran.graph_sizes >= {0, 1, 2, 4}
    assert replay.num_replays >= 10
    assert any(record.num_blocks_out and record.graph_size for record in ran.records)
    assert sum(record.num_blocks_back for record in ran.records) > 0


def test_cache_on_and_off_give_the_same_tokens(run: Callable[..., Ran], alone: Ran) -> None:
    requests = workload()
    ran = run(requests, GuardedReplay(), num_blocks=60, enable_prefix_cache=False)
    assert not any(record.prefix_hits for record in ran.records)
    assert_same(requests, ran, alone)


def test_deterministic_mode_gives_the_same_bits_captured_or_not(run: Callable[..., Ran]) -> None:
    names = ("greedy", "figures", "drawn", "penalized", "limited", "long")
    requests = {name: workload()[name] for name in names}
    requests |= {
        name: replace(asked, params=replace(asked.params, logprobs=0)) for name, asked in requests.items()
    }
    settings: dict[str, Any] = {"dtype": "float32", "deterministic": True, "num_blocks": 60}
    together = run(requests, GuardedReplay(), **settings)
    assert together.graph_sizes >= {0, 1, 2, 4}
    for name, asked in requests.items():
        alone = run({name: asked}, GuardedReplay(), enforce_eager=True, **settings)
        assert together.tokens[name] == alone.tokens[name], name
        assert together.logprobs[name] == alone.logprobs[name], f"{name}: same tokens, other bits"


def test_padding_leaves_the_blocks_of_others_alone(run: Callable[..., Ran]) -> None:
    """Three rows in a graph of four, every block of the pool held: the fourth row's key must go to no block of theirs."""
    greedy = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    requests = {f"r{i}": Asked([i + 1, 2 * i + 3, 5, 7 + i], greedy) for i in range(3)}
    alone = {name: run({name: asked}).tokens[name] for name, asked in requests.items()}
    ran = run(requests, GuardedReplay(), num_blocks=21, max_num_seqs=3)
    assert 4 in ran.graph_sizes
    assert ran.tokens == alone


class Copies(TorchDispatchMode):
    """Counts values copied from the memory that uploads are packed in."""

    def __init__(self, staging: Tensor) -> None:
        super().__init__()
        self._staging = staging.untyped_storage().data_ptr()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op._schema.name == "aten::copy_" and args[1].untyped_storage().data_ptr() == self._staging:
            self.sizes.append(args[1].numel())
        return op(*args, **(kwargs or {}))


def test_a_step_is_one_upload_that_does_not_grow_with_the_context(
    make_runner: Callable[..., ModelRunner], plans: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, packed = make_runner(replay=GuardedReplay()), []
    assert runner._graphs is not None
    pack = device_batch.upload

    def upload(parts: Any, device: torch.device) -> list[Tensor]:
        sent = pack(parts, device)
        packed.append(sum(len(part) for part in sent))
        return sent

    monkeypatch.setattr(device_batch, "upload", upload)

    def sizes_of(plan: Any) -> tuple[list[int], list[int], int]:
        packed.clear()
        with Copies(runner._graphs._staging) as copies:
            runner.submit(plan)
        return list(packed), copies.sizes, runner.collect().graph_size

    text = list(range(30))
    prompt = plans.plan_of(0, [(0, 0, 30)], samples=[0], admitted=[plans.admit(0, text, list(range(8)))])
    (size,), none, graph = sizes_of(prompt)
    assert (none, graph) == ([], 0)
    assert 3 * 30 < size < 3 * 30 + 40, "rows and positions of its tokens, and the prompt once"
    none, long, graph = sizes_of(plans.plan_of(1, [(0, 30, 1)], samples=[0]))
    assert (none, long, graph) == ([], [4], 1)
    sizes_of(plans.plan_of(2, [(1, 0, 3)], samples=[0], admitted=[plans.admit(1, text[:3], [9])]))
    assert sizes_of(plans.plan_of(3, [(1, 3, 1)], samples=[0])) == ([], [4], 1)
