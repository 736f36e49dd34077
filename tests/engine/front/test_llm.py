"""LLM, the front for notebooks: what it returns, what it refuses, and that it leaves nothing behind."""

from __future__ import annotations

import _thread
import gc
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from engine import (
    LLM,
    ConfigError,
    EngineDeadError,
    EngineWorker,
    FinishReason,
    InvalidRequestError,
    ModelNotFoundError,
    PromptTooLongError,
    SamplingParams,
    StepFailedError,
)
from engine.fake_runner import expected_tokens, fake_logprobs, scripted

SHORT = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
MakeWorker = Callable[..., EngineWorker]


@pytest.fixture
def fake_llm(make_worker: MakeWorker) -> Callable[..., LLM]:
    """An LLM on the fake runner; keywords as for make_worker."""
    return lambda *args, **more: LLM.from_worker(make_worker(*args, **more))


@pytest.fixture(scope="module")
def model_folder(
    tmp_path_factory: pytest.TempPathFactory, wrapped: Callable[[str], PreTrainedTokenizerFast]
) -> Path:
    """A tiny Llama of random weights with a byte-level tokenizer, saved by transformers."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = wrapped("byte_level")
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=1, bos_token_id=0, initializer_range=0.4,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny_llm(model_folder: Path) -> Iterator[LLM]:
    with LLM(model_folder, dtype="float64", device="cpu", num_blocks=64, num_threads=1) as llm:
        yield llm


@pytest.fixture(scope="module")
def reference(model_folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(model_folder, dtype=torch.float64).eval()


# ── what comes back ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_completions_come_in_the_order_of_the_prompts(fake_llm: Callable[..., LLM]) -> None:
    llm = fake_llm()
    prompts = [[i + 1] * (1 + i % 5) for i in range(30)]
    params = [SHORT.with_(max_tokens=1 + (7 * i) % 11) for i in range(30)]
    completions = llm.generate(prompts, params, use_tqdm=False)
    for prompt, asked, completion in zip(prompts, params, completions, strict=True):
        assert completion.prompt_token_ids == tuple(prompt)
        assert completion.token_ids == tuple(expected_tokens(prompt, asked.max_tokens or 0, 256))
        assert completion.finish_reason is FinishReason.LENGTH
    assert llm.stats().finished == {"length": 30}


def test_one_prompt_or_many_as_text_or_ids(fake_llm: Callable[..., LLM]) -> None:
    llm = fake_llm()
    ids = list(b"abc")
    for one in ("abc", ids, tuple(ids), np.array(ids), [np.int64(i) for i in ids]):
        (completion,) = llm.generate(one, SHORT, use_tqdm=False)
        assert completion.prompt_token_ids == tuple(ids)
    mixed = llm.generate(["abc", ids, np.array(ids)], SHORT, use_tqdm=False)
    assert [c.prompt_token_ids for c in mixed] == [tuple(ids)] * 3
    assert llm.generate([], SHORT) == []
    assert llm.generate("abc", use_tqdm=False)[0].num_output_tokens == SamplingParams().max_tokens


def test_chat_takes_one_conversation_or_several(fake_llm: Callable[..., LLM]) -> None:
    llm = fake_llm(choose=scripted("Hello 🙂"))
    chat = [{"role": "user", "content": "Hi"}]
    params = SamplingParams(max_tokens=50)
    for messages in (chat, [chat]):
        (completion,) = llm.chat(messages, params, use_tqdm=False)
        assert completion.text == "Hello 🙂"
        assert completion.prompt_token_ids == tuple(llm.tokenizer.apply_chat_template(chat))
    assert [c.text for c in llm.chat([chat, chat], [params, params.with_(stop="🙂")], use_tqdm=False)] == [
        "Hello 🙂",
        "Hello ",
    ]
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert "'name': 'f'" in llm.tokenizer.decode(llm.chat(chat, params, tools=tools)[0].prompt_token_ids)


def test_scores_are_the_prompts_own(fake_llm: Callable[..., LLM]) -> None:
    texts = ["hello there", [1, 2, 3], "x"]
    scores = fake_llm().score(texts, use_tqdm=False)
    assert scores[0].token_ids == tuple(b"hello there")
    for score in scores[:2]:
        wanted = [fake_logprobs(token, 0, 256).logprob for token in score.token_ids[1:]]
        assert score.logprobs == tuple(wanted)
        assert score.total_logprob == pytest.approx(sum(wanted))
        assert score.perplexity == pytest.approx(math.exp(-sum(wanted) / len(wanted)))
    assert scores[2].logprobs == ()
    assert math.isnan(scores[2].perplexity)


def test_progress_is_shown_on_request(
    fake_llm: Callable[..., LLM], capsys: pytest.CaptureFixture[str]
) -> None:
    llm = fake_llm()
    llm.generate(["a", "b"], SHORT, use_tqdm=False)
    assert capsys.readouterr().err == ""
    llm.generate(["a", "b"], SHORT)
    shown = capsys.readouterr().err
    assert "requests" in shown
    assert "/2" in shown


# ── what is refused, and what fails ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "bad", [7, None, b"bytes", {"prompt": "x"}, [["a"]], [[1.5]], [None], [{"role": "user"}]]
)
def test_what_is_no_prompt_is_refused(fake_llm: Callable[..., LLM], bad: Any) -> None:
    with pytest.raises(InvalidRequestError, match="prompt must be"):
        fake_llm().generate(bad, SHORT)


def test_as_many_params_as_prompts(fake_llm: Callable[..., LLM]) -> None:
    with pytest.raises(InvalidRequestError, match="2 sampling params were given for 3 prompts"):
        fake_llm().generate(["a", "b", "c"], [SHORT, SHORT])


def test_one_bad_prompt_stops_all_before_any_work(fake_llm: Callable[..., LLM]) -> None:
    llm = fake_llm()
    with pytest.raises(PromptTooLongError):
        llm.generate([[1], [2] * 5000, [3]], SHORT)
    for messages in ("hello", {"role": "user", "content": "x"}):
        with pytest.raises(InvalidRequestError):
            llm.chat(messages, SHORT)  # type: ignore[arg-type]
    assert llm.stats().steps == 0


def test_unknown_settings_and_models_are_typed_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_num_seq'"):
        LLM(tmp_path, max_num_seq=3)
    with pytest.raises(ConfigError, match="block_size"):
        LLM(tmp_path, block_size=17)
    with pytest.raises(ModelNotFoundError):
        LLM(tmp_path / "nowhere")


def test_failed_requests_come_back_marked_beside_the_others(fake_llm: Callable[..., LLM]) -> None:
    llm = fake_llm({"max_num_seqs": 1}, fail_at={2: RuntimeError("hiccup")})
    with pytest.warns(RuntimeWarning, match="1 of 2 requests failed.*hiccup"):
        lost, saved = llm.generate([[1], [2]], SHORT, use_tqdm=False)
    assert lost.finish_reason is FinishReason.ERROR
    assert saved.token_ids == tuple(expected_tokens([2], 6, 256))


def test_a_score_that_failed_raises(fake_llm: Callable[..., LLM]) -> None:
    llm = fake_llm(fail_at={0: RuntimeError("hiccup")})
    with pytest.warns(RuntimeWarning), pytest.raises(StepFailedError, match="hiccup"):
        llm.score("hello", use_tqdm=False)


def test_a_dead_engine_raises(fake_llm: Callable[..., LLM]) -> None:
    llm = fake_llm(fail_at={1: EngineDeadError("gone")})
    for _ in range(2):
        with pytest.raises(EngineDeadError, match="gone"):
            llm.generate("a", SHORT)
    assert "dead" in repr(llm)


@pytest.fixture
def heard_interrupts() -> Iterator[None]:
    """Python's own SIGINT handler: a process that was started in the background of a shell ignores the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard_interrupts")
def test_an_interrupt_aborts_all_requests_of_the_call(fake_llm: Callable[..., LLM]) -> None:
    llm = fake_llm(delay_s=0.002)
    endless = SHORT.with_(max_tokens=900)

    def interrupt() -> None:
        while llm.stats().num_running < 8:
            time.sleep(0.005)
        _thread.interrupt_main()

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[i + 1] for i in range(8)], endless, use_tqdm=False)
    interrupter.join()
    assert {r.finish_reason for r in llm.worker.records.requests()} <= {FinishReason.ABORT}
    (completion,) = llm.generate([1], SHORT, use_tqdm=False)  # the next call finds an idle engine
    assert completion.token_ids == tuple(expected_tokens([1], 6, 256))
    assert len(llm.worker.records.requests()) == 9


def test_an_llm_over_someone_elses_worker_leaves_it_running(make_worker: MakeWorker) -> None:
    worker = make_worker()
    LLM.from_worker(worker).close()
    assert worker.health().ok


# ── a real model ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_greedy_text_is_that_of_transformers(tiny_llm: LLM, reference: LlamaForCausalLM) -> None:
    prompts = ["The quick brown fox", "naïve café 🙂", "def f(x):"]
    completions = tiny_llm.generate(prompts, SHORT.with_(max_tokens=24), use_tqdm=False)
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([tiny_llm.tokenizer.encode(prompt)])
        wanted = reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, min_new_tokens=24, do_sample=False,
            pad_token_id=0, eos_token_id=None,
        )[0, ids.shape[1] :].tolist()  # fmt: skip
        assert list(completion.token_ids) == wanted
        assert completion.text == tiny_llm.tokenizer.decode(wanted)


def test_n_completions_stand_side_by_side_and_have_seeds_in_a_row(tiny_llm: LLM) -> None:
    prompts = ["The quick brown fox jumps over the lazy dog", "def f(x):"]
    params = SHORT.with_(temperature=1.0, max_tokens=12, seed=2**63 - 2, n=3)
    found = [c.token_ids for c in tiny_llm.generate(prompts, params, use_tqdm=False)]
    seeds = (2**63 - 2, 2**63 - 1, -(2**63))  # the last seed is followed by the first
    each = [[params.with_(n=1, seed=seed) for seed in seeds] for _ in prompts]
    pairs = [(prompt, one) for prompt, some in zip(prompts, each, strict=True) for one in some]
    alone = [tiny_llm.generate(prompt, one, use_tqdm=False)[0].token_ids for prompt, one in pairs]
    assert found == alone
    assert len(set(found)) == 6
    unseeded = tiny_llm.generate(prompts[0], params.with_(seed=None), use_tqdm=False)
    assert len({c.token_ids for c in unseeded}) == 3
    # The first completion's full blocks serve the others.
    size = tiny_llm.config.block_size
    full = (len(unseeded[0].prompt_token_ids) - 1) // size * size
    fresh = tiny_llm.generate(prompts[0] + " again", params, use_tqdm=False)
    assert full > 0
    assert all(c.num_cached_tokens >= full for c in fresh[1:])


def test_best_of_are_the_completions_of_the_highest_mean_logprob(tiny_llm: LLM) -> None:
    prompts = ["The quick brown fox", "def f(x):"]
    params = SHORT.with_(temperature=1.0, max_tokens=9, seed=11, ignore_eos=False)
    found = tiny_llm.generate(prompts, params.with_(n=2, best_of=7), use_tqdm=False)
    every = tiny_llm.generate(prompts, params.with_(n=7, logprobs=0), use_tqdm=False)
    for place in range(2):
        group = every[7 * place : 7 * place + 7]
        means = [sum(entry.logprob for entry in c.logprobs) / len(c.logprobs) for c in group]
        ranked = sorted(range(7), key=lambda i: -means[i])
        best = found[2 * place : 2 * place + 2]
        assert [c.token_ids for c in best] == [group[i].token_ids for i in ranked[:2]]
        assert [c.seed for c in best] == [11 + i for i in ranked[:2]]
    assert all(c.logprobs == () for c in found), "nobody asked for them"
    (told,) = tiny_llm.generate("a", params.with_(best_of=2, logprobs=1), use_tqdm=False)
    assert len(told.logprobs) == len(told.token_ids)
    mixed = tiny_llm.generate(prompts, [params.with_(best_of=2), params.with_(n=2)], use_tqdm=False)
    assert [c.prompt_token_ids for c in mixed] == [
        found[0].prompt_token_ids,
        *[found[2].prompt_token_ids] * 2,
    ]


@pytest.mark.parametrize(("asked", "param"), [({"n": 2}, "n"), ({"best_of": 2}, "best_of")])
def test_one_request_is_one_completion(tiny_llm: LLM, asked: dict[str, int], param: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"params.each\(\)") as caught:
        tiny_llm.worker.submit("x", SHORT.with_(**asked))
    assert (caught.value.param, caught.value.value) == (param, 2)


def test_scores_are_those_of_transformers(tiny_llm: LLM, reference: LlamaForCausalLM) -> None:
    text = "It's 42 times faster, naïve 🙂!"
    (score,) = tiny_llm.score(text, use_tqdm=False)
    ids = torch.tensor(tiny_llm.tokenizer.encode(text))
    with torch.no_grad():
        wanted = torch.log_softmax(reference(ids[None]).logits[0, :-1], -1).gather(1, ids[1:, None])[:, 0]
    assert score.token_ids == tuple(ids.tolist())
    torch.testing.assert_close(
        torch.tensor(score.logprobs, dtype=torch.float64), wanted, atol=1e-5, rtol=1e-5
    )
    assert score.perplexity == pytest.approx(float(torch.exp(-wanted.mean())), rel=1e-4)


def test_the_resolved_settings_can_be_read(tiny_llm: LLM) -> None:
    config = tiny_llm.config
    assert (config.dtype, config.device, config.max_model_len) == ("float64", "cpu", 256)
    assert config.max_batched_tokens is not None
    assert "healthy" in repr(tiny_llm)


@pytest.fixture
def young_heap() -> Iterator[None]:
    """Sets aside what is alive already, so that the collector only looks at what the test makes."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def tensor_bytes() -> int:
    """Bytes of all tensors that the test made and that are alive, each storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.usefixtures("young_heap")
@pytest.mark.parametrize("how", ["close", "with", "forget"])
def test_two_models_one_after_the_other_leave_nothing_behind(model_folder: Path, how: str) -> None:
    def cycle() -> int:
        llm = LLM(model_folder, dtype="float32", device="cpu", num_blocks=4096, num_threads=1)
        llm.generate("hello", SHORT, use_tqdm=False)
        inside = tensor_bytes()
        if how == "close":
            llm.close()
            with pytest.raises(EngineDeadError, match="closed"):
                llm.generate("hello", SHORT)
        elif how == "with":
            with llm:
                pass
        return inside

    threads, empty = threading.active_count(), tensor_bytes()
    first = cycle()
    cache_bytes = 4096 * 16 * 2 * 2 * 2 * 8 * 4
    assert first - empty > cache_bytes, "the measurement does not see the KV cache"
    between = tensor_bytes()
    second = cycle()
    after = tensor_bytes()
    assert (between, after) == (empty, empty)
    assert second <= first
    assert threading.active_count() == threads
