"""Several models in one host: a swap that no running stream notices, reasons to stay, and memory that comes back."""

from __future__ import annotations

import gc
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.errors import EngineDeadError, ModelNotFoundError, OutOfMemoryError
from engine.records import MemoryLedger
from engine.request import FinishReason
from engine.sampling_params import SamplingParams
from workbench.errors import NotReadyError, UnknownModelError
from workbench.host import EngineHost, HostPhase, ResidentInUseError, fake_worker
from workbench.memory_budget import _first_on_gpu, _further, _Needs, fit_beside
from workbench.settings import FAKE_MODEL
from workbench.versions.ref import ResolvedVersion, VersionRef

PROMPTS = [[20 + i, 40 + i, 60 + i, 7] for i in range(16)]
LONG = SamplingParams(max_tokens=480, temperature=0.0, ignore_eos=True)


class Versions:
    """A registry in memory: what the host needs of one."""

    def __init__(self, folders: dict[int, Path]) -> None:
        self.folders = folders
        self.champion = 1
        self.num_lookups = 0

    def __call__(self, ref: str) -> Any:
        self.num_lookups += 1
        name, _, what = ref.removeprefix("models:/").replace("@", "/@").partition("/")
        version = self.champion if what == "@champion" else int(what)
        if version not in self.folders:
            raise UnknownModelError(f"{name} has no version {version}", value=version)
        return ResolvedVersion(
            VersionRef(name, version, None, f"digest-{version}", ""), self.folders[version]
        )


@pytest.fixture(scope="module")
def folders(tiny_model: Path, other_models: list[Path]) -> dict[int, Path]:
    """Three models of one shape with different random weights."""
    return {1: tiny_model, 2: other_models[0], 3: other_models[1]}


def config(folder: Path | str, **more: Any) -> EngineConfig:
    values = {"dtype": "float32", "device": "cpu", "num_blocks": 512, "num_threads": 1, **more}
    return EngineConfig(model=str(folder), **values)


@pytest.fixture(scope="module")
def alone(folders: dict[int, Path]) -> dict[int, list[tuple[int, ...]]]:
    """What each version answers when it is the only one."""
    found = {}
    for version, folder in folders.items():
        with EngineHost(config(folder)) as host:
            assert host.wait(120).ready, host.state().message
            streams = [host.worker().submit(prompt, LONG) for prompt in PROMPTS]
            found[version] = [stream.result(120).token_ids for stream in streams]
    return found


@pytest.fixture
def fakes() -> Iterator[Callable[..., EngineHost]]:
    """Hosts over runners without a model; closed with the test."""
    hosts: list[EngineHost] = []

    def make(versions: Versions | None = None, **options: Any) -> EngineHost:
        factory = options.pop("factory", partial(fake_worker, delay_s=0.002))
        host = EngineHost(EngineConfig(model=FAKE_MODEL), factory=factory, resolver=versions, **options)
        hosts.append(host)
        host.start()
        assert host.wait(20).ready
        return host

    yield make
    for host in hosts:
        host.close()


def eventually(condition: Callable[[], bool], timeout_s: float = 15.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def test_sixteen_streams_keep_their_version_through_a_swap_and_new_ones_get_the_next(
    folders: dict[int, Path], alone: dict[int, list[tuple[int, ...]]]
) -> None:
    assert all(a != b for a, b in zip(alone[1], alone[2])), "the versions must answer differently"
    versions = Versions(folders)
    with EngineHost(config(folders[1]), resolver=versions) as host:
        assert host.wait(120).ready
        host.follow("tickets@champion")
        host.serve("tickets@champion", 1)
        old = host.worker("tickets@champion")
        running = [old.submit(prompt, LONG) for prompt in PROMPTS]
        assert eventually(lambda: all(stream.drain() > 0 for stream in running)), "all 16 run before the swap"
        host.serve("tickets@champion", 2)
        new = host.worker("tickets@champion")
        assert new is not old
        assert old.num_live == 16, "all of them were running when the swap was done"
        later = [new.submit(prompt, LONG) for prompt in PROMPTS]
        for streams, version in ((running, 1), (later, 2)):
            completions = [stream.result(120) for stream in streams]
            assert [c.finish_reason for c in completions] == [FinishReason.LENGTH] * 16
            assert [c.token_ids for c in completions] == alone[version]
        assert eventually(lambda: not host.draining())
        with pytest.raises(EngineDeadError):
            old.submit([1, 2], LONG)
        assert [r.id for r in host.resident()] == ["tiny-llama", "tickets/2"]
        assert host.followed()[0].serving_version == 2


def test_the_default_can_be_swapped_under_load(
    folders: dict[int, Path], alone: dict[int, list[tuple[int, ...]]]
) -> None:
    with EngineHost(config(folders[1])) as host:
        assert host.wait(120).ready
        old = host.worker()
        running = [old.submit(prompt, LONG) for prompt in PROMPTS]
        swapped = host.load(str(folders[3]), as_default=True)
        assert (swapped.is_default, swapped.id) == (True, "v3")
        assert old.num_live == 16
        later = host.worker().submit(PROMPTS[0], LONG)
        assert [stream.result(120).token_ids for stream in running] == alone[1]
        assert later.result(120).token_ids == alone[3][0]
        assert eventually(lambda: [r.id for r in host.resident()] == ["v3"] and not host.draining())
        assert host.state().ready


def test_models_are_found_by_id_version_alias_and_scheme(fakes: Any, folders: dict[int, Path]) -> None:
    host = fakes(Versions(folders))
    first = host.load("tickets@champion")
    second = host.load("tickets/2")
    assert (first.id, first.version, first.aliases, first.followed) == (
        "tickets/1",
        1,
        ("tickets@champion",),
        True,
    )
    assert (second.id, second.digest, second.followed) == ("tickets/2", "digest-2", False)
    for name in ("tickets/1", "models:/tickets/1", "tickets@champion", "models:/tickets@champion"):
        assert host.worker(name) is host.worker("tickets/1")
    assert [card.id for card in host.models()] == [FAKE_MODEL, "tickets/1", "tickets/2"]
    assert host.models()[1].title == "tickets v1"
    with pytest.raises(UnknownModelError) as caught:
        host.worker("tickets@candidate")
    assert caught.value.limit == [FAKE_MODEL, "tickets/1", "tickets/2"]


def test_what_is_there_is_not_loaded_again(fakes: Any, folders: dict[int, Path]) -> None:
    made: list[EngineConfig] = []

    def counting(config: EngineConfig, *, progress: Any, on_fatal: Any) -> Any:
        made.append(config)
        return fake_worker(config, on_fatal=on_fatal)

    versions = Versions(folders)
    host = fakes(versions, factory=counting)
    assert host.load("tickets/1").id == host.load("models:/tickets@champion").id == host.load("tickets/1").id
    assert len(made) == 2  # the default one and this
    exact = host.load("tickets/1", deterministic=True)
    assert (exact.id, exact.deterministic) == ("tickets/1#deterministic", True)
    assert [c.deterministic for c in made] == [False, False, True]
    assert {c.version_digest for c in made[1:]} == {"digest-1"}  # the prefix cache's key
    assert host.worker("tickets/1") is not host.worker("tickets/1#deterministic")


def test_threads_that_ask_for_one_model_at_once_share_it(fakes: Any, folders: dict[int, Path]) -> None:
    host = fakes(Versions(folders))
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(host.load("tickets/2").id)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == ["tickets/2"] * 8
    assert [r.id for r in host.resident()] == [FAKE_MODEL, "tickets/2"]


def test_a_model_stays_while_somebody_needs_it(fakes: Any, folders: dict[int, Path]) -> None:
    host = fakes(Versions(folders))

    def ids() -> list[str]:
        return [resident.id for resident in host.resident()]

    for _ in range(2):
        host.load("tickets/1", hold=True)  # two jobs
    host.release("tickets/1")
    assert "tickets/1" in ids()
    host.load("tickets/1")  # and a person
    host.release("tickets/1")
    assert "tickets/1" in ids()
    host.unload("tickets/1")
    assert "tickets/1" not in ids()
    host.load("tickets@champion")
    host.load("tickets/1", hold=True)
    host.release("tickets/1")
    assert "tickets/1" in ids(), "the followed alias still names it"
    host.unload("tickets/1")
    assert not host.followed()
    assert "tickets@champion" not in host.known_aliases()
    with pytest.raises(ResidentInUseError):
        host.unload(FAKE_MODEL)
    with pytest.raises(UnknownModelError):
        host.unload("tickets/1")
    assert eventually(lambda: not host.draining())


def test_a_held_version_outlives_the_alias_that_has_moved_on(fakes: Any, folders: dict[int, Path]) -> None:
    host = fakes(Versions(folders))
    host.load("tickets@champion")
    host.load("tickets/1", hold=True)
    host.serve("tickets@champion", 2)
    assert {r.id for r in host.resident()} == {FAKE_MODEL, "tickets/1", "tickets/2"}
    assert host.worker("tickets@champion") is host.worker("tickets/2")
    host.release("tickets/1")
    assert {r.id for r in host.resident()} == {FAKE_MODEL, "tickets/2"}


def test_what_a_killed_job_held_goes_when_nobody_has_used_it_for_long(
    fakes: Any, folders: dict[int, Path]
) -> None:
    host = fakes(Versions(folders))
    host.load("tickets/1", hold=True)
    host.load("tickets/2", hold=True)
    long = SamplingParams(max_tokens=1500, ignore_eos=True)
    stream = host.worker("tickets/2").submit("hi", long)
    host.release_idle(60.0)
    assert len(host.resident()) == 3
    time.sleep(0.05)
    host.release_idle(0.02)
    assert [r.id for r in host.resident()] == [FAKE_MODEL, "tickets/2"], "that one is at work"
    stream.abort()
    stream.result(10)
    host.load("tickets/2")  # by a person
    time.sleep(0.05)
    host.release_idle(0.02)
    assert [r.id for r in host.resident()] == [FAKE_MODEL, "tickets/2"]


def test_an_alias_that_is_not_followed_leads_nowhere_when_it_moves(
    fakes: Any, folders: dict[int, Path]
) -> None:
    host = fakes(Versions(folders))
    host.load("tickets@champion", hold=True)
    host.note("tickets@champion", 1)
    assert host.worker("tickets@champion")
    host.note("tickets@champion", 2)
    with pytest.raises(UnknownModelError):
        host.worker("tickets@champion")
    assert host.worker("tickets/1")


def test_a_load_that_fails_leaves_everything_as_it_was(fakes: Any, folders: dict[int, Path]) -> None:
    def picky(config: EngineConfig, *, progress: Any, on_fatal: Any) -> Any:
        if config.version_digest == "digest-2":
            raise ZeroDivisionError("odd weights")
        return fake_worker(config, on_fatal=on_fatal)

    host = fakes(Versions(folders), factory=picky)
    host.load("tickets@champion")
    with pytest.raises(Exception, match="odd weights") as caught:
        host.serve("tickets@champion", 2)
    assert type(caught.value).__name__ == "ModelLoadError"
    with pytest.raises(UnknownModelError, match="no version 9"):
        host.load("tickets/9")
    assert [r.id for r in host.resident()] == [FAKE_MODEL, "tickets/1"]
    assert host.worker("tickets@champion") is host.worker("tickets/1")
    assert host.followed()[0].serving_version == 1


def test_a_model_that_loads_is_shown_and_says_how_far_it_is(fakes: Any, folders: dict[int, Path]) -> None:
    gate, started = threading.Event(), threading.Event()

    def slow(config: EngineConfig, *, progress: Any, on_fatal: Any) -> Any:
        if config.model != FAKE_MODEL:
            progress("Reading weights", 0.5)
            started.set()
            assert gate.wait(30)
        return fake_worker(config, on_fatal=on_fatal)

    host = fakes(Versions(folders), factory=slow)
    thread = threading.Thread(target=host.load, args=("tickets/2",))
    thread.start()
    assert started.wait(20)
    loading = host.resident()[1]
    assert (loading.id, loading.state.phase, loading.state.fraction) == ("tickets/2", HostPhase.LOADING, 0.5)
    assert [card.id for card in host.models()] == [FAKE_MODEL]
    with pytest.raises(NotReadyError, match="50%"):
        host.worker("tickets/2")
    assert host.worker(), "the default answers meanwhile"
    gate.set()
    thread.join(30)
    assert host.worker("tickets/2")


def test_changed_files_under_the_same_name_replace_the_model(
    tmp_path: Path, folders: dict[int, Path], fakes: Any
) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(folders[1], folder)
    host = fakes(Versions(folders))
    before = host.load(str(folder))
    old = host.worker("mine")
    shutil.copy(folders[2] / "model.safetensors", folder / "model.safetensors")
    after = host.load(str(folder))
    assert (before.id, after.id) == ("mine", "mine")
    assert before.digest != after.digest
    assert host.worker("mine") is not old
    assert [r.id for r in host.resident()] == [FAKE_MODEL, "mine"]
    elsewhere = tmp_path / "else" / "mine"
    shutil.copytree(folders[3], elsewhere)
    other = host.load(str(elsewhere))
    assert other.id == f"mine-{other.digest[:8]}"


def test_a_dying_second_engine_is_fatal_too(fakes: Any, folders: dict[int, Path]) -> None:
    deaths: list[BaseException] = []

    def fragile(config: EngineConfig, *, progress: Any, on_fatal: Any) -> Any:
        fail_at = None if config.model == FAKE_MODEL else {0: EngineDeadError("device lost")}
        return fake_worker(config, on_fatal=on_fatal, fail_at=fail_at, delay_s=0.0)

    host = fakes(Versions(folders), factory=fragile, on_fatal=deaths.append)
    host.load("tickets/1")
    host.worker("tickets/1").submit("hi", SamplingParams()).result(10)
    assert eventually(lambda: len(deaths) == 1)
    assert host.resident()[1].state.phase is HostPhase.FAILED
    assert host.state().ready


def test_closing_ends_those_that_drain(fakes: Any, folders: dict[int, Path]) -> None:
    closed: list[str] = []
    host = fakes(Versions(folders), on_closed=lambda card, worker: closed.append(card.id))
    host.load("tickets/1")
    stream = host.worker("tickets/1").submit("hi", SamplingParams(max_tokens=1000, ignore_eos=True))
    host.unload("tickets/1")
    assert [r.state.phase for r in host.draining()] == [HostPhase.DRAINING]
    host.close()
    assert stream.result(10).finish_reason is FinishReason.ABORT
    assert sorted(closed) == sorted([FAKE_MODEL, "tickets/1"])
    with pytest.raises(NotReadyError):
        host.load("tickets/2")


# ── memory ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def rss_bytes() -> int:
    import os

    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_an_unloaded_model_gives_its_memory_back(
    folders: dict[int, Path], request: pytest.FixtureRequest
) -> None:
    pool = 96 << 20
    shape = config(folders[1], num_blocks=None, kv_memory_bytes=pool, max_num_seqs=4)
    with EngineHost(config(folders[3], num_blocks=16), budget=lambda c, others: shape_of(c, shape)) as host:
        assert host.wait(120).ready
        gc.freeze()  # as the app does after a load
        request.addfinalizer(gc.unfreeze)
        before = 0
        for cycle in range(3):
            host.load(str(folders[2]))
            worker = host.worker("v2")
            prompt = [5] * 1000  # each token's keys and values are written: the pool's pages become real
            touch(worker)
            loaded = rss_bytes()
            worker.submit(prompt, SamplingParams(max_tokens=2, ignore_eos=True)).result(60)
            del worker
            host.unload("v2")
            assert eventually(lambda: not host.draining())
            after = rss_bytes()
            assert loaded - after > pool * 0.8, f"cycle {cycle}: {loaded - after} of {pool} bytes came back"
            if cycle:
                assert after - before < 8 << 20, f"cycle {cycle} kept {after - before} bytes"
            before = after


def shape_of(given: EngineConfig, shape: EngineConfig) -> EngineConfig:
    from dataclasses import replace

    if given.num_blocks == 16 and given.model.endswith("v2"):
        return replace(given, num_blocks=None, kv_memory_bytes=shape.kv_memory_bytes, max_num_seqs=4)
    return given


def touch(worker: Any) -> None:
    """Write to the whole KV cache, as long use would."""
    for cache in worker._engine._runner._caches:
        cache.k.fill_(0.5)
        cache.v.fill_(0.5)


def test_a_second_engine_gets_a_modest_pool(folders: dict[int, Path]) -> None:
    first = config(folders[1], num_blocks=None)
    assert fit_beside(first, {}) == first, "alone, the engine's own defaults hold"
    ledger = MemoryLedger(1 << 20, 1 << 30, 1 << 20, 0, "cpu")
    second = fit_beside(config(folders[2], num_blocks=None), {"one": ledger})
    block = 2 * 2 * 2 * 16 * 4 * 16  # K and V, layers, heads, size, bytes, tokens
    assert second.num_blocks is not None
    assert second.num_blocks * block <= 256 << 20
    assert second.max_model_len == 1024
    assert fit_beside(config(folders[2], num_blocks=32), {"one": ledger}).num_blocks == 32


def test_an_engine_that_does_not_fit_beside_the_others_is_refused_with_bytes_and_remedy(
    folders: dict[int, Path],
) -> None:
    huge = MemoryLedger(1 << 50, 1 << 30, 1 << 20, 0, "cpu")
    with pytest.raises(OutOfMemoryError) as caught:
        fit_beside(config(folders[2], num_blocks=None), {"big/7": huge})
    error = caught.value
    assert error.value > 0
    assert error.limit == 0
    assert f"{error.value} bytes" in error.message
    assert "big/7" in error.message
    assert "Unload big/7" in str(error)


def test_a_refused_second_engine_leaves_the_first_serving(folders: dict[int, Path]) -> None:
    def stingy(given: EngineConfig, others: Any) -> EngineConfig:
        return fit_beside(given, {name: MemoryLedger(1 << 50, 0, 0, 0, "cpu") for name in others})

    with EngineHost(config(folders[1]), budget=stingy) as host:
        assert host.wait(120).ready
        with pytest.raises(OutOfMemoryError):
            host.load(str(folders[2]))
        with pytest.raises(ModelNotFoundError, match="/no/such/folder"):
            host.load("/no/such/folder")
        assert [r.id for r in host.resident()] == ["tiny-llama"]
        assert host.worker().submit([3, 4], SamplingParams(max_tokens=2)).result(60).num_output_tokens


@pytest.mark.parametrize(
    ("weights_gib", "free_gib"), [(0.02, 16), (0.02, 139), (14, 48), (14, 80), (14, 139), (60, 139)]
)
def test_the_first_engine_on_a_gpu_leaves_room_for_a_successor_of_its_size(
    weights_gib: float, free_gib: int
) -> None:
    needs = _Needs(int(weights_gib * 2**30), 1 << 30, 2 << 20, 256, 256 * 256, 4096)
    free = free_gib << 30
    first = _first_on_gpu(needs, free)
    left = free - needs.fixed - first * needs.block
    asked = _further(config("x", num_blocks=None), needs, left, on_cpu=False)
    assert min(asked, (left - needs.fixed) // needs.block) >= needs.blocks_a_context
    assert first * needs.block >= 0.6 * (free - 2 * needs.fixed), "and still takes most of what is left"


def test_an_engine_of_which_only_one_fits_a_gpu_takes_what_there_is() -> None:
    needs = _Needs(60 << 30, 1 << 30, 2 << 20, 256, 256 * 256, 4096)
    free = 80 << 30
    assert _first_on_gpu(needs, free) * needs.block > 0.9 * (free - needs.fixed)
