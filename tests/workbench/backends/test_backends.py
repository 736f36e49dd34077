"""What every backend does alike: one or many, in order, typed refusals, versions loaded and given back, records without loss."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.errors import InvalidRequestError, PromptTooLongError
from engine.request import FinishReason
from engine.sampling_params import SamplingParams
from workbench.backends.app import AppBackend
from workbench.backends.local import LocalBackend
from workbench.backends.openai import OpenAIBackend
from workbench.backends.protocol import Backend, BackendLostError, BackendUnsupportedError
from workbench.connect import connect
from workbench.errors import ServerUnreachableError, UnknownModelError
from workbench.run_state import RunState

GREEDY = SamplingParams(max_tokens=6, temperature=0.0)
CHATS = [[{"role": "user", "content": text}] for text in ("the cat", "a small dog reads", "under the tree")]


@pytest.fixture(scope="module")
def local(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalBackend]:
    from workbench.settings import Settings

    settings = Settings(
        home_dir=tmp_path_factory.mktemp("local") / "home", model=str(tiny_model), num_blocks=256, threads=1,
        dtype="float32",
    )  # fmt: skip
    with LocalBackend(settings) as backend:
        yield backend


@pytest.fixture(scope="module")
def attached(app: Any) -> Iterator[Backend]:
    with connect(app.home) as backend:
        assert isinstance(backend, AppBackend)
        yield backend


@pytest.fixture(params=["local", "attached"])
def backend(request: pytest.FixtureRequest) -> Backend:
    found: Backend = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module")
def other_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shape with other weights."""
    from safetensors.numpy import load_file, save_file

    folder = tmp_path_factory.mktemp("other") / "other-llama"
    shutil.copytree(tiny_model, folder)
    weights = {name: -value for name, value in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_many_come_back_in_order_and_one_is_a_list_of_one(backend: Backend) -> None:
    many = backend.chat(CHATS, GREEDY, max_concurrency=2)
    each = [backend.chat(chat, GREEDY)[0] for chat in CHATS]
    assert [done.prompt_token_ids for done in many] == [done.prompt_token_ids for done in each]
    assert [done.token_ids for done in many] == [done.token_ids for done in each]
    assert all(done.finish_reason is FinishReason.LENGTH and done.error is None for done in many)
    assert all(done.ttft_ms is not None and 0 < done.ttft_ms <= done.e2e_ms for done in many)
    assert len({done.request_id for done in many}) == 3


def test_params_may_differ_and_their_seed_counts(backend: Backend) -> None:
    params = [SamplingParams(max_tokens=n, temperature=1.0, seed=n) for n in (2, 5, 9)]
    first = backend.generate(["the cat"] * 3, params)
    assert [len(done.token_ids) for done in first] == [2, 5, 9]
    assert [done.seed for done in first] == [2, 5, 9]
    assert [done.token_ids for done in first] == [
        done.token_ids for done in backend.generate(["the cat"] * 3, params)
    ]


def test_scores_are_those_of_the_model(local: Backend, attached: Backend) -> None:
    texts = ["the cat reads a small house", [1, 2, 3, 4]]
    for here, there in zip(local.score(texts), attached.score(texts), strict=True):
        assert here.token_ids == there.token_ids
        assert here.logprobs == pytest.approx(there.logprobs, abs=1e-5)
        assert here.total_logprob == pytest.approx(math.fsum(here.logprobs))
        assert here.perplexity == pytest.approx(math.exp(-here.total_logprob / len(here.logprobs)))


def test_divergence_is_that_of_the_models(local: Backend, attached: Backend) -> None:
    texts = ["the cat reads a small house", [1, 2, 3, 4]]
    for backend in (local, attached):
        for one in backend.token_kl(texts, other=backend.models()[0]):
            assert set(one.kl) == {0.0}, "a model does not differ from itself"
            assert len(one.kl) == len(one.token_ids) - 1 == len(one.logprobs)
        with pytest.raises(UnknownModelError, match="nothing"):
            backend.token_kl(texts, other="nothing")


def test_bad_input_is_typed_and_nothing_else_runs(backend: Backend) -> None:
    with pytest.raises(InvalidRequestError, match="sampling params"):
        backend.generate(["a", "b"], [GREEDY])
    with pytest.raises(InvalidRequestError, match="max_concurrency"):
        backend.generate("a", GREEDY, max_concurrency=0)
    with pytest.raises(InvalidRequestError, match="best_of is 3"):
        backend.generate("a", GREEDY.with_(best_of=3))
    with pytest.raises(InvalidRequestError, match="messages"):
        backend.chat("hello")  # type: ignore[arg-type]
    with pytest.raises(PromptTooLongError) as caught:
        backend.generate([[5] * 5000, "fine"], GREEDY)
    assert caught.value.remedy or caught.value.limit
    with pytest.raises(UnknownModelError, match="nothing"):
        backend.generate("a", GREEDY, model="nothing")
    assert backend.generate([], GREEDY) == []


def test_a_second_version_is_loaded_asked_and_given_back(
    backend: Backend, other_model: Path, eventually: Callable[..., bool]
) -> None:
    before = backend.models()
    other = backend.load(str(other_model))
    assert backend.models()[0] == before[0]
    assert other in backend.models()
    here, there = (backend.generate("the cat reads", GREEDY, model=model)[0] for model in (None, other))
    assert here.token_ids != there.token_ids
    assert backend.stats(other).model != backend.stats().model
    backend.unload(other)
    assert eventually(lambda: backend.models() == before)
    with pytest.raises(UnknownModelError):
        backend.generate("a", GREEDY, model=other)


def test_deterministic_is_a_version_of_its_own(
    backend: Backend, tiny_model: Path, eventually: Callable[..., bool]
) -> None:
    fixed = backend.load(str(tiny_model), deterministic=True)
    assert fixed != backend.models()[0]
    assert backend.stats(fixed).deterministic
    assert not backend.stats().deterministic
    params = SamplingParams(max_tokens=6, temperature=1.0, seed=3, logprobs=1)
    alone = backend.generate("the cat", params, model=fixed)[0]
    among = backend.generate(["the cat", *["a dog under the house"] * 5], params, model=fixed)[0]
    assert (alone.token_ids, alone.logprobs) == (among.token_ids, among.logprobs), "bit by bit"
    backend.unload(fixed)
    assert eventually(lambda: fixed not in backend.models())


def test_records_are_those_of_the_requests(backend: Backend) -> None:
    since = time.monotonic_ns()
    done = backend.generate(["the cat", "a dog"], GREEDY)
    records = backend.records(since_ns=since)
    assert {record.request_id for record in records.requests} == {each.request_id for each in done}
    for record in records.requests:
        assert record.num_output_tokens == len(record.token_ns) == 6
        assert since < record.arrival_ns < record.token_ns[0] <= record.finished_ns < time.monotonic_ns()
    assert records.steps
    assert sum(step.num_decode_tokens + step.num_prefill_tokens for step in records.steps) > 0
    assert backend.stats().finished["length"] >= 2


def test_what_was_loaded_for_a_backend_goes_with_it(
    app: Any, other_model: Path, eventually: Callable[..., bool], attached: Backend
) -> None:
    with connect(app.home, model=str(other_model)) as backend:
        assert backend.models()[0] == "other-llama"
        assert (
            backend.generate("a", GREEDY)[0].token_ids
            == backend.generate("a", GREEDY, model="other-llama")[0].token_ids
        )
        with pytest.raises(UnknownModelError, match="not loaded by this backend"):
            attached.unload("other-llama")
    assert eventually(lambda: "other-llama" not in attached.models())


def test_a_closed_backend_says_so(app: Any) -> None:
    from engine.errors import EngineDeadError

    backend = connect(app.home)
    backend.close()
    backend.close()
    with pytest.raises((BackendLostError, EngineDeadError)):
        backend.generate("a", GREEDY)


def test_a_wrong_token_is_refused(app: Any) -> None:
    from dataclasses import replace

    from workbench.errors import WorkbenchError

    running = RunState(app.home / "run").read()
    assert running is not None
    with AppBackend(replace(running, token="wrong")) as backend, pytest.raises(WorkbenchError, match="token"):
        backend.generate("a", GREEDY)


def test_ctrl_c_ends_what_runs_in_the_app(
    attached: Backend, eventually: Callable[..., bool], app: Any
) -> None:
    import threading

    from workbench.backends.window import in_window

    with connect(app.home) as backend:
        assert isinstance(backend, AppBackend)
        long = {"prompts": ["the cat"], "params": [{"max_tokens": 900, "ignore_eos": True}]}
        begun = threading.Event()

        def slow() -> Any:
            begun.set()
            return backend._post("/quire/generate", long)

        def interrupted() -> Any:
            begun.wait(10)
            assert eventually(lambda: attached.stats().num_running > 0)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            in_window([slow, interrupted], 2, backend.hang_up)
        assert eventually(lambda: attached.stats().num_running == 0)
        assert backend.generate("the cat", GREEDY)[0].error is None, "the backend can still be used"


# ── any OpenAI endpoint ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_openai_gives_the_same_text_and_counts(app: Any, attached: Backend) -> None:
    running = RunState(app.home / "run").read()
    assert running is not None
    with OpenAIBackend(running.url) as backend:
        assert backend.models()[0] == "tiny-llama"
        params = SamplingParams(
            max_tokens=6, temperature=0.0, logprobs=1, repetition_penalty=1.5, presence_penalty=0.5, logit_bias={7: 3.0},
            bad_words=("cat",),
        )  # fmt: skip
        for public, internal in zip(backend.chat(CHATS, params), attached.chat(CHATS, params), strict=True):
            assert (public.text, public.finish_reason) == (internal.text, internal.finish_reason)
            assert public.num_output_tokens == internal.num_output_tokens
            assert public.num_prompt_tokens == internal.num_prompt_tokens
            assert set(public.token_ids) == {-1}, "ids are not on that wire"
            assert [p.logprob for p in public.logprobs] == pytest.approx(
                [p.logprob for p in internal.logprobs]
            )
            assert public.ttft_ms is not None
            assert 0 < public.ttft_ms <= public.e2e_ms
        assert backend.generate("the cat", params)[0].text == attached.generate("the cat", params)[0].text


def test_openai_refuses_by_name_what_it_cannot_do(app: Any) -> None:
    running = RunState(app.home / "run").read()
    assert running is not None
    with OpenAIBackend(running.url) as backend:
        for call in (
            lambda: backend.score("a"), lambda: backend.token_kl("a", other="b"), lambda: backend.load("x"), lambda: backend.stats(), lambda: backend.records(),
            lambda: backend.unload("x"), lambda: backend.load("tiny-llama", deterministic=True),
        ):  # fmt: skip
            with pytest.raises(BackendUnsupportedError):
                call()
        assert backend.load("tiny-llama") == "tiny-llama"
        with pytest.raises(UnknownModelError):
            backend.generate("a", GREEDY, model="nothing")


def test_openai_without_a_server_is_typed() -> None:
    with pytest.raises(ServerUnreachableError):
        OpenAIBackend("127.0.0.1:9")
    with pytest.raises(BackendLostError):
        OpenAIBackend("http://127.0.0.1:9")
