"""A real engine that sleeps: the memory is given back for certain, and the tokens after waking are those before."""

from __future__ import annotations

import gc
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine.build import build_engine
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import CorruptWeightsError
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.runner import parked_weights
from engine.runner.parked_weights import ParkedWeights, storages_of
from engine.sampling_params import SamplingParams

MIB = 1 << 20
PROMPT = [5, 9, 2, 61, 17, 30, 44, 8, 3, 71] * 3
PARAMS = SamplingParams(max_tokens=12, temperature=0.8, seed=3, ignore_eos=True)


def answer(engine: Engine, name: str) -> list[int]:
    engine.add(engine.make_request(PROMPT, PARAMS, request_id=name))
    tokens: list[int] = []
    while engine.has_work:
        for delta in engine.step().deltas:
            assert delta.error is None, delta.error
            tokens.extend(delta.token_ids)
    return tokens


def tensor_bytes() -> int:
    """Bytes of all tensors that live, each memory once."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def resident_bytes() -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


@pytest.mark.parametrize(
    ("level", "settings"),
    [
        (1, {"dtype": "float32"}),
        (2, {"dtype": "float32"}),
        (2, {"dtype": "float32", "attention_backend": "reference"}),
        (2, {"dtype": "bfloat16", "quantization": "int8"}),
    ],
    ids=["compiled-1", "compiled-2", "reference-2", "quantized-2"],
)
def test_tokens_after_waking_equal_those_before(
    tiny_models: Callable[[str], Any], settings: dict[str, Any], level: int
) -> None:
    folder = tiny_models("qwen3_norm_window").folder
    engine = build_engine(EngineConfig(model=str(folder), device="cpu", num_blocks=40, **settings))
    expected = answer(engine, "before")
    for _ in range(2):
        engine.sleep(level)
        engine.wake_up()
        assert answer(engine, "after") == expected
    engine.close()


def test_kv_memory_and_weights_are_truly_given_back(tiny_models: Callable[[str], Any]) -> None:
    """64 MiB of KV cache and the weights, in tensors that live and in the process's resident memory.

    The cache is memory of its own from the system: what stays resident of it is nothing. 16 MiB are for what else moves in the
    process.
    """
    folder = tiny_models("qwen3_norm_window").folder
    nothing = tensor_bytes()
    engine = build_engine(
        EngineConfig(model=str(folder), device="cpu", dtype="float32", kv_memory_bytes=64 * MIB)
    )
    engine._runner._caches[0].k._base.fill_(0.0)  # memory that was never written is not resident
    expected = answer(engine, "before")
    awake, resident = tensor_bytes(), resident_bytes()
    ledger = engine.stats().memory
    assert ledger is not None
    engine.sleep(1)
    assert awake - tensor_bytes() == ledger.kv_bytes
    assert resident - resident_bytes() > 48 * MIB
    engine.wake_up()
    assert tensor_bytes() == awake
    assert answer(engine, "between") == expected
    engine.sleep(2)
    assert tensor_bytes() - nothing < awake - nothing - ledger.kv_bytes - 0.9 * ledger.weights_bytes
    engine.wake_up()
    assert tensor_bytes() <= awake
    assert answer(engine, "after") == expected
    engine.sleep(1)
    engine.close()
    assert tensor_bytes() <= nothing, "closed while it slept, it keeps something"


def test_weights_that_cannot_be_loaded_again_leave_it_asleep(
    tiny_models: Callable[[str], Any], tmp_path: Path
) -> None:
    folder = tiny_models("qwen3_norm_window").copy(tmp_path / "model")
    engine = build_engine(EngineConfig(model=str(folder), device="cpu", dtype="float32", num_blocks=40))
    expected = answer(engine, "before")
    engine.sleep(2)
    weights = folder / "model.safetensors"
    shutil.move(weights, tmp_path / "kept")
    weights.write_bytes((tmp_path / "kept").read_bytes()[:1000])
    with pytest.raises(CorruptWeightsError):
        engine.wake_up()
    assert engine.is_sleeping
    shutil.move(tmp_path / "kept", weights)
    engine.wake_up()
    assert answer(engine, "after") == expected
    engine.close()


def test_parked_weights_leave_their_place_empty_and_come_back_to_every_view(
    tiny_models: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chunks are small here, so that tensors lie across several and several in one."""
    monkeypatch.setattr(parked_weights, "CHUNK_BYTES", 4096)
    model = ModelConfig.from_folder(tiny_models("qwen2_bias_window").folder)
    decoder = Decoder(model, dtype=torch.bfloat16, device=torch.device("cpu"), max_positions=32)
    for parameter in decoder.parameters():
        parameter.normal_()
    views = dict(decoder.weight_targets())
    before = {name: view.clone() for name, view in views.items()} | {"rotary": decoder.rotary.clone()}
    size = sum(storage.nbytes() for storage in storages_of(decoder))
    assert size >= sum(view.nbytes for view in views.values()) + decoder.rotary.nbytes
    parked = ParkedWeights(decoder)
    assert parked.num_bytes == size
    assert all(parameter.untyped_storage().nbytes() == 0 for parameter in decoder.parameters())
    parked.restore()
    assert parked.num_bytes == 0
    assert all(torch.equal(view, before[name]) for name, view in views.items())
    assert torch.equal(decoder.rotary, before["rotary"])
    assert decoder.lm_head.weight.data_ptr() == decoder.embedding.data_ptr(), "tied"


def test_weights_for_which_there_is_no_room_stay_parked(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.ParameterList([nn.Parameter(torch.randn(n), requires_grad=False) for n in (3, 5, 7)])
    before = [parameter.clone() for parameter in module]
    parked = ParkedWeights(module)
    resize = torch.UntypedStorage.resize_

    def refuse_the_last(self: torch.UntypedStorage, size: int) -> Any:
        if size == 4 * 7:
            raise torch.OutOfMemoryError("no room")
        return resize(self, size)

    with monkeypatch.context() as patch:
        patch.setattr(torch.UntypedStorage, "resize_", refuse_the_last)
        with pytest.raises(torch.OutOfMemoryError):
            parked.restore()
    assert all(parameter.untyped_storage().nbytes() == 0 for parameter in module)
    parked.restore()
    assert all(map(torch.equal, module, before))
