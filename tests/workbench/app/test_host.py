"""EngineHost: loading in the background, typed states, lookup, and an end that leaves nothing."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.errors import EngineDeadError, ModelLoadError, ModelNotFoundError, OutOfMemoryError
from engine.sampling_params import SamplingParams
from workbench.api.errors import status_of
from workbench.errors import NotReadyError, UnknownModelError
from workbench.host import FAKE_ANSWER, EngineHost, HostPhase, fake_host, fake_worker, load_worker
from workbench.settings import FAKE_MODEL, bundled_model

CONFIG = EngineConfig(model=FAKE_MODEL)


def test_fake_host_answers() -> None:
    with fake_host() as host:
        assert host.state().phase is HostPhase.READY
        [card] = host.models()
        assert (card.id, card.is_demo, card.context) == (FAKE_MODEL, True, 2048)
        assert host.worker().submit("hi", SamplingParams(max_tokens=400)).result(30).text == FAKE_ANSWER
        assert host.worker(card.id) is host.worker()


def test_states_go_from_idle_over_loading_to_ready_and_closed() -> None:
    gate, started = threading.Event(), threading.Event()

    def slow(config: Any, *, progress: Any, on_fatal: Any) -> Any:
        progress("Reading weights", 0.5)
        started.set()
        assert gate.wait(30)
        return fake_worker(config, on_fatal=on_fatal)

    host = EngineHost(CONFIG, factory=slow)
    assert host.state().phase is HostPhase.IDLE
    with pytest.raises(NotReadyError):
        host.worker()
    host.start()
    assert started.wait(30)
    loading = host.state()
    assert (loading.phase, loading.message, loading.fraction) == (HostPhase.LOADING, "Reading weights", 0.5)
    with pytest.raises(NotReadyError, match="50%"):
        host.worker()
    gate.set()
    assert host.wait(30).ready
    worker = host.worker()
    host.close()
    host.close()
    assert host.state().phase is HostPhase.CLOSED
    with pytest.raises(NotReadyError):
        host.worker()
    with pytest.raises(EngineDeadError):
        worker.submit("hi", SamplingParams())


def test_closing_while_it_loads_closes_what_comes() -> None:
    gate, made = threading.Event(), []

    def slow(config: Any, *, progress: Any, on_fatal: Any) -> Any:
        assert gate.wait(30)
        made.append(fake_worker(config, on_fatal=on_fatal))
        return made[0]

    host = EngineHost(CONFIG, factory=slow)
    host.start()
    host.close()
    gate.set()
    assert host._thread is not None
    host._thread.join(30)
    assert host.state().phase is HostPhase.CLOSED
    with pytest.raises(EngineDeadError):
        made[0].submit("hi", SamplingParams())


def test_unknown_model_is_named_with_those_that_exist() -> None:
    with fake_host() as host, pytest.raises(UnknownModelError) as caught:
        host.worker("other")
    assert (caught.value.value, caught.value.limit) == ("other", [FAKE_MODEL])


def test_a_load_error_stays_typed_and_any_other_becomes_typed(caplog: pytest.LogCaptureFixture) -> None:
    def fail(error: Exception, *args: Any, **hooks: Any) -> Any:
        raise error

    typed = ModelNotFoundError("no model folder /x", value="/x", remedy="Name one.")
    for error in (typed, ZeroDivisionError("odd")):
        host = EngineHost(CONFIG, factory=partial(fail, error))
        host.start()
        state = host.wait(10)
        assert state.phase is HostPhase.FAILED
        assert isinstance(state.error, ModelLoadError)
        assert state.error.remedy
        with pytest.raises(NotReadyError, match="no model"):
            host.worker()
    assert "ZeroDivisionError" in state.message
    assert state.error.__cause__ is not None


def test_a_model_that_does_not_fit_is_refused_before_its_weights_are_read(
    tiny_model: Path, tmp_path: Path, fault: Any
) -> None:
    (tmp_path / "config.json").write_text((tiny_model / "config.json").read_text())  # no weights at all
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((tiny_model / name).read_text())
    config = EngineConfig(
        model=str(tmp_path), device="cpu", dtype="float32", num_blocks=10**10, num_threads=1
    )
    with EngineHost(config, factory=load_worker) as host:
        error = host.wait(60).error
        assert isinstance(error, OutOfMemoryError), error
        assert error.remedy
        with pytest.raises(NotReadyError) as caught:
            host.worker()
    fault(
        "out of memory at load", fails=f"the load, before weights are read: `{error.code}` with bytes and remedy; requests to that model "
        f"get {status_of(caught.value)} `{caught.value.code}`", goes_on="pages, and models that are loaded",
        afterwards="what was loaded before",
    )  # fmt: skip


def test_a_missing_folder_fails_with_its_name() -> None:
    host = EngineHost(EngineConfig(model="/no/such/folder"), factory=load_worker)
    host.start()
    error = host.wait(60).error
    assert isinstance(error, ModelNotFoundError)
    assert error.value == "/no/such/folder"


def test_a_death_of_the_engine_is_told_once_and_shown() -> None:
    deaths: list[BaseException] = []
    factory = partial(fake_worker, fail_at={0: EngineDeadError("device lost")}, delay_s=0.0)
    host = EngineHost(CONFIG, factory=factory, on_fatal=deaths.append)
    host.start()
    host.wait(10)
    worker = host.worker()
    worker.submit("hi", SamplingParams()).result(10)
    assert worker._thread is not None
    worker._thread.join(10)
    assert len(deaths) == 1
    assert host.state().phase is HostPhase.FAILED
    assert "device lost" in host.state().message
    host.close()


def test_the_real_engine_loads_with_digest_and_progress(tiny_model: Path) -> None:
    seen: list[tuple[str, float]] = []

    def watched(config: EngineConfig, *, progress: Any, on_fatal: Any) -> Any:
        def tell(message: str, fraction: float) -> None:
            seen.append((message, fraction))
            progress(message, fraction)

        return load_worker(config, progress=tell, on_fatal=on_fatal)

    config = EngineConfig(model=str(tiny_model), dtype="float32", device="cpu", num_blocks=32, num_threads=1)
    with EngineHost(config, factory=watched) as host:
        assert host.wait(120).ready, host.state().message
        [card] = host.models()
        assert (card.id, card.context, card.is_demo) == (
            "tiny-llama",
            512,
            False,
        )  # 32 blocks hold 512 tokens
        assert host.worker().config.version_digest == card.digest != ""
        assert (
            host.worker()
            .submit([20, 21], SamplingParams(max_tokens=3, ignore_eos=True))
            .result(60)
            .num_output_tokens
            == 3
        )
    assert len(seen) >= 2


def test_the_bundled_model_says_that_it_is_a_demo() -> None:
    from workbench.model_card import read_model_card

    card = read_model_card(str(bundled_model()))
    assert card.is_demo
    assert "demo, 7 M" in card.title
    assert card.trained_for
    assert card.prompt_chips
    assert all(chip.messages and chip.title for chip in card.prompt_chips)
