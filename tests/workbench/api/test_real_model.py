"""The API over the real engine: a tiny random model, true arithmetic, sampling and cache."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import pytest

USER = [{"role": "user", "content": "the cat reads a tree"}]


def test_greedy_is_the_same_whole_streamed_and_from_the_engine(real_server: Any) -> None:
    from engine.sampling_params import SamplingParams

    ask = partial(
        real_server.openai.chat.completions.create,
        model=real_server.model, messages=USER, temperature=0, max_tokens=24, extra_body={"ignore_eos": True},
    )  # fmt: skip
    whole = ask().choices[0].message.content
    streamed = "".join(c.choices[0].delta.content or "" for c in ask(stream=True))
    worker = real_server.worker
    ids = worker.tokenizer.apply_chat_template(USER)
    direct = worker.submit(ids, SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)).result(60)
    assert whole == streamed == direct.text
    assert len(direct.token_ids) == 24


def test_controls_are_the_engine_s(real_server: Any) -> None:
    from engine.sampling_params import SamplingParams

    worker = real_server.worker
    plain = {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True}
    ids = worker.tokenizer.apply_chat_template(USER)
    free = worker.submit(ids, SamplingParams(**plain)).result(60)
    favourite = free.token_ids[0]
    controls = {
        "presence_penalty": 0.5, "frequency_penalty": 0.4, "repetition_penalty": 1.2, "bad_words": ["tree"],
        "logit_bias": {str(favourite): -100.0}, "allowed_token_ids": list(range(worker.tokenizer.vocab_size)),
    }  # fmt: skip
    body = {"model": real_server.model, "messages": USER, **plain, **controls}
    answer = real_server.http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"][
        "content"
    ]
    direct = worker.submit(ids, SamplingParams(**plain, **controls)).result(60)
    assert answer == direct.text != free.text
    assert favourite not in direct.token_ids


def test_a_seed_repeats_and_choices_of_one_seed_differ(real_server: Any) -> None:
    ask = partial(
        real_server.openai.chat.completions.create,
        model=real_server.model, messages=USER, temperature=1.0, max_tokens=24, extra_body={"ignore_eos": True},
    )  # fmt: skip
    first, again = ask(seed=7, n=3), ask(seed=7, n=3)
    texts = [c.message.content for c in first.choices]
    assert texts == [c.message.content for c in again.choices]
    assert len(set(texts)) == 3
    assert ask(seed=8).choices[0].message.content == texts[1]  # choice i has the seed plus i
    assert ask(seed=99).choices[0].message.content != texts[0]


def test_logprobs_are_those_of_the_greedy_choice(real_server: Any) -> None:
    answer = real_server.openai.chat.completions.create(
        model=real_server.model, messages=USER, temperature=0, max_tokens=6, logprobs=True, top_logprobs=4,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    for entry in answer.choices[0].logprobs.content:
        tops = [top.logprob for top in entry.top_logprobs]
        assert tops == sorted(tops, reverse=True)
        assert entry.logprob == pytest.approx(tops[0])
        assert entry.logprob < 0


def test_eight_prompts_with_a_shared_prefix_reuse_its_full_blocks(real_server: Any, eventually: Any) -> None:
    """One of them still runs; the others' cached tokens are exactly 16 times the shared full blocks."""
    worker = real_server.worker
    words = worker.tokenizer.encode(
        "the small dog then reads under a large tree and the house ", add_special_tokens=False
    )
    prefix = (words * 500)[:500]
    prompts = [
        prefix + worker.tokenizer.encode(f" question {i} answer", add_special_tokens=False) for i in range(8)
    ]
    shared_blocks = len(prefix) // 16
    body = {"temperature": 0, "ignore_eos": True}
    running = threading.Thread(
        target=real_server.post,
        args=("/v1/completions",),
        kwargs={"prompt": prompts[0], "max_tokens": 300, **body},
    )
    running.start()
    assert eventually(lambda: worker.stats().num_running == 1)
    assert eventually(lambda: worker.stats().output_tokens > 0, 30)
    usages = [
        real_server.post("/v1/completions", prompt=prompt, max_tokens=4, **body).json()["usage"]
        for prompt in prompts[1:]
    ]
    still_running = running.is_alive()
    running.join(60)
    assert still_running, "the first request ended too early for this test to mean anything"
    cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
    assert cached[0] == 16 * shared_blocks
    assert set(cached) == {16 * shared_blocks}
    mixed = [r for r in worker.records.steps() if r.num_prefill_tokens and r.num_decode_tokens]
    assert any(len({request_id for request_id, _ in record.rows}) > 1 for record in mixed)


def test_a_prompt_over_the_context_is_refused_with_the_models_limit(real_server: Any) -> None:
    response = real_server.post("/v1/completions", prompt=[20] * 1024)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert "1023" in response.json()["error"]["message"]


def test_half_a_surrogate_pair_is_refused(real_server: Any) -> None:
    body = b'{"messages": [{"role": "user", "content": "\\ud800"}]}'
    response = real_server.http.post(
        "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
    )
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_request")
    assert "surrogate" in response.json()["error"]["message"]
