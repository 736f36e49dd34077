"""Many adapters in one batch: each request gets what it gets alone, whatever comes, goes, and shares its steps."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.attention.reference import ReferenceAttention
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import InvalidRequestError
from engine.kernels.lora import tokens_by_slot
from engine.llm import LLM
from engine.memory import make_kv_spec, torch_dtype
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.models.lora import LoraSlots, slots_bytes
from engine.models.weights import load_weights
from engine.runner.adapters import Adapters
from engine.runner.model_runner import ModelRunner
from engine.runner.profile_run import largest_steps
from engine.sampling_params import SamplingParams

Build = Callable[..., Engine]
Adapter = Callable[..., Path]
# Ranks and modules of eight adapters, one of which changes everything.
KINDS: list[dict[str, Any]] = [
    {"rank": 8}, {"rank": 1}, {"rank": 2, "targets": ("q_proj", "v_proj")}, {"rank": 3, "targets": ("k_proj", "o_proj")},
    {"rank": 4, "targets": ("gate_proj",)}, {"rank": 5, "targets": ("up_proj", "down_proj"), "use_rslora": True},
    {"rank": 6, "layers": (1,)}, {"rank": 7, "lora_alpha": 3},
]  # fmt: skip
SHARED = [7, 3, 11, 2, 19, 23, 5, 31]  # two blocks that all prompts begin with


@pytest.fixture(scope="module")
def folders(adapter: Adapter, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {f"a{i}": adapter(root / str(i), seed=i, **kind) for i, kind in enumerate(KINDS)}


def requests() -> dict[str, tuple[list[int], str | None]]:
    """Two of each adapter and of the base, their prompts of different lengths."""
    names = [None, *[f"a{i}" for i in range(len(KINDS))]]
    return {
        f"{name} {turn}": (
            [*SHARED, *[(i * 13 + turn * 7 + k) % 61 for k in range(1 + (5 * i + turn) % 9)]],
            name,
        )
        for turn in (0, 1)
        for i, name in enumerate(names)
    }


@pytest.mark.parametrize(
    ("settings", "is_exact"),
    [
        ({"max_loras": 8}, False),
        ({"max_loras": 3, "max_batched_tokens": 16, "num_blocks": 24}, False),
        ({"max_loras": 8, "dtype": "float32", "deterministic": True}, True),
        pytest.param(
            {"max_loras": 3, "dtype": "float32", "deterministic": True, "attention_backend": "reference"},
            True,
            marks=pytest.mark.full,
        ),
    ],
    ids=["all-at-once", "few-slots-and-blocks", "deterministic", "deterministic-few-slots"],
)
def test_a_request_gets_what_it_gets_alone(
    settings: dict[str, Any], is_exact: bool, build: Build, run: Any, folders: dict[str, Path]
) -> None:
    engine = build(**settings)
    for name, folder in folders.items():
        engine.add_lora(name, folder)
    asked = requests()
    together = run(engine, asked, arrive={name: i // 3 for i, name in enumerate(asked)}, max_tokens=9)
    adapters = [{asked[name][1] for name in batch} - {None} for batch in together.batches]
    assert max(map(len, adapters)) == settings["max_loras"], "the slots were never full"
    assert any(None in {asked[name][1] for name in batch} for batch in together.batches if len(batch) > 1)
    outputs = {tuple(together.tokens[f"{name} 0"]) for name in [None, *folders]}
    assert len(outputs) >= 7, "the adapters make no difference, so the test has none to see"
    for name in list(asked)[: len(KINDS) + 1]:
        alone = run(engine, {name: asked[name]}, max_tokens=9)
        assert together.tokens[name] == alone.tokens[name], name
        if is_exact:
            assert together.logprobs[name] == alone.logprobs[name], name
        else:
            # float64 sums whose order depends on the number of rows, over two layers.
            assert together.logprobs[name] == pytest.approx(alone.logprobs[name], abs=1e-9), name
    if settings["max_loras"] == 8:
        plain = run(build(**settings, enable_lora=False), {"None 0": asked["None 0"]}, max_tokens=9)
        assert plain.tokens["None 0"] == together.tokens["None 0"]


def test_another_adapter_under_a_used_name_never_sees_the_keys_of_the_first(
    build: Build, run: Any, folders: dict[str, Path]
) -> None:
    prompt = [*SHARED, *SHARED, 1, 2, 3]
    fresh = build()
    fresh.add_lora("it", folders["a7"])
    expected = run(fresh, {"r": (prompt, "it")}).logprobs["r"]
    engine = build()
    first = engine.add_lora("it", folders["a0"])
    other = run(engine, {"r": (prompt, "it"), "base": (prompt, None)}).logprobs["r"]
    engine.remove_lora("it")
    assert engine.loras == ()
    second = engine.add_lora("it", folders["a7"])
    assert (second.digest, second.lora_id) != (first.digest, first.lora_id)
    # Log-probabilities tell more than tokens; float64 sums of a chunk and of a whole prompt differ by their order.
    assert run(engine, {"s": (prompt, "it")}).logprobs["s"] == pytest.approx(expected, abs=1e-9)
    assert other != pytest.approx(expected, abs=1e-3)
    # The same content under any name finds what it computed before.
    assert engine.add_lora("again", folders["a0"]).digest == first.digest
    before = engine.stats().cached_prompt_tokens
    assert run(engine, {"t": (prompt, "again")}).logprobs["t"] == pytest.approx(other, abs=1e-9)
    assert engine.stats().cached_prompt_tokens - before == 16


def test_an_adapter_that_is_removed_serves_its_requests_to_their_end(
    build: Build, run: Any, folders: dict[str, Path]
) -> None:
    """Also with steps of another adapter of its name beside them, and with more adapters than slots."""
    engine = build(max_loras=2)
    names = ("a0", "a1", "a2")
    for name in names:
        engine.add_lora(name, folders[name])
    asked = {name: (SHARED, name) for name in names}
    alone = {name: run(engine, {name: asked[name]}).tokens[name] for name in names}
    too_late = engine.make_request(SHARED, SamplingParams(max_tokens=2), lora="a0")

    def swap() -> None:
        engine.remove_lora("a0")
        engine.remove_lora("a2")
        with pytest.raises(InvalidRequestError, match="no adapter 'a2'") as caught:
            engine.make_request(SHARED, SamplingParams(), lora="a2")
        assert caught.value.limit == ["a1"]
        with pytest.raises(InvalidRequestError, match="no adapter 'a2'"):
            engine.remove_lora("a2")
        engine.add_lora("a0", folders["a5"])
        with pytest.raises(InvalidRequestError, match="was removed"):
            engine.add(too_late)

    ran = run(engine, {**asked, "new": (SHARED, "a0")}, arrive={"new": 4}, at={3: swap})
    assert ran.errors == {}
    assert {name: ran.tokens[name] for name in names} == alone
    fresh = build()
    fresh.add_lora("x", folders["a5"])
    assert ran.tokens["new"] == run(fresh, {"x": (SHARED, "x")}).tokens["x"]


class Again:
    """Implements ``engine.runner.decode_graphs.Replay``: does the work each time, and counts."""

    def __init__(self) -> None:
        self.times: dict[Hashable, int] = {}

    def __call__(self, key: Hashable, work: Callable[[], None]) -> None:
        self.times[key] = self.times.get(key, 0) + 1
        work()

    def close(self) -> None:
        pass


def test_captured_steps_read_the_slots_of_rows_on_the_device(
    base: Path, build: Build, run: Any, folders: dict[str, Path]
) -> None:
    config = EngineConfig(
        model=str(base), dtype="float64", device="cpu", num_blocks=64, block_size=4, max_num_seqs=8, max_model_len=64,
        max_batched_tokens=64, attention_backend="reference", enable_lora=True, max_loras=2, max_lora_rank=8,
    )  # fmt: skip
    model, dtype, device = ModelConfig.from_folder(base), torch_dtype(config), torch.device("cpu")
    decoder = Decoder(model, dtype=dtype, device=device, max_positions=64)
    load_weights(decoder, base)
    slots = LoraSlots(model, max_loras=2, max_rank=8, dtype=dtype, device=device)
    slots.attach(decoder, use_kernel=False, deterministic=False)
    kv_spec, replay = make_kv_spec(model, 4, dtype), Again()
    attention: Any = CapturableReference()
    runner = ModelRunner(
        decoder, attention, config=config, kv_spec=kv_spec, eos_token_ids=frozenset(), device=device, dtype=dtype,
        lora_slots=slots, replay=replay,
    )  # fmt: skip
    runner.capture()
    captured = set(replay.times)
    assert {key[-1] for key in captured if key[0] == "forward"} == {False, True}
    engine = Engine(
        config,
        runner,
        kv_spec=kv_spec,
        eos_token_ids=frozenset(),
        vocab_size=model.vocab_size,
        lora_store=runner.adapters,
    )
    plain = build(max_loras=2)
    for name in ("a0", "a3", "a7"):
        engine.add_lora(name, folders[name])
        plain.add_lora(name, folders[name])
    asked = {"base": (SHARED, None), **{n: ([*SHARED, i], n) for i, n in enumerate(("a0", "a3", "a7"))}}
    arrive = {"base": 0, "a0": 3, "a3": 5, "a7": 6}  # the base alone first, then beside adapters
    before = dict(replay.times)
    got, want = run(engine, asked, arrive=arrive), run(plain, asked, arrive=arrive)
    assert got.tokens == want.tokens
    used = {key for key in captured if replay.times[key] > before[key]}
    assert {key[-1] for key in used if key[0] == "forward"} == {False, True}
    assert set(replay.times) == captured
    engine.close()


class CapturableReference(ReferenceAttention):
    """torch's attention as captured steps take it: table columns past a context are cut off by its length."""

    short_context = 0

    def prepare_capture(self, *sizes: Any) -> None:
        pass

    def fits_captured(self, seq_lens: Any) -> bool:
        return True


def test_tokens_are_listed_by_slot_in_their_order() -> None:
    found = tokens_by_slot(torch.tensor([2, -1, 0, 2, -1, 0], dtype=torch.int32), 4)
    assert found.order.tolist() == [1, 4, 2, 5, 0, 3]
    assert found.starts.tolist() == [2, 4, 4, 6, 6]


def test_the_largest_steps_use_every_slot_from_addresses_that_no_kernel_is_compiled_anew_for(
    base: Path,
) -> None:
    model, cpu = ModelConfig.from_folder(base), torch.device("cpu")
    for max_loras, num_tokens in ((2, 33), (3, 34), (7, 35)):
        config = EngineConfig(
            model="base", num_blocks=64, max_num_seqs=8, max_model_len=64, max_batched_tokens=num_tokens, enable_lora=True,
            max_loras=max_loras,
        )  # fmt: skip
        slots = LoraSlots(model, max_loras=max_loras, max_rank=8, dtype=torch.float32, device=cpu)
        adapters = Adapters(slots, 8)
        for plan in largest_steps(config, model.vocab_size):
            adapters.apply(plan)
            adapters.use(plan)
            found = slots.tokens
            assert found is not None
            expected = np.repeat(np.arange(8, dtype=np.int32) % max_loras, plan.num_tokens)
            listed = tokens_by_slot(torch.from_numpy(expected), max_loras)
            assert torch.equal(found.order, listed.order)
            assert torch.equal(found.starts, listed.starts)
            assert found.order.data_ptr() % 16 == found.starts.data_ptr() % 16 == 0


def test_slots_are_counted_among_the_weights(build: Build, base: Path) -> None:
    model = ModelConfig.from_folder(base)
    ledgers = [
        build(enable_lora=lora, max_loras=5, attention_backend="reference").stats().memory
        for lora in (True, False)
    ]
    # All but the scales, a few hundred bytes.
    with_slots, without = (ledger.weights_bytes for ledger in ledgers if ledger is not None)
    assert with_slots - without >= slots_bytes(model, torch.float64, max_loras=5, max_rank=8) - 5 * 14 * 8


@pytest.mark.full
def test_embeddings_are_those_of_the_adapter(
    base: Path, adapter: Adapter, merge: Callable[..., Path], tmp_path: Path
) -> None:
    folder = adapter(tmp_path / "a", seed=3, rank=4)
    merged = merge(base, folder, tmp_path / "merged", lambda module: 2.0)
    settings = {"dtype": "float64", "num_blocks": 64, "num_threads": 1}
    with LLM(base, enable_lora=True, max_lora_rank=8, **settings) as llm, LLM(merged, **settings) as expected:
        llm.add_lora("a", folder)
        plain = llm.embed(SHARED, use_tqdm=False)[0].vector
        (found,) = llm.embed(SHARED, lora="a", use_tqdm=False)
        np.testing.assert_allclose(
            found.vector, expected.embed(SHARED, use_tqdm=False)[0].vector, rtol=0, atol=1e-12
        )
        assert np.abs(found.vector - plain).max() > 1e-3
