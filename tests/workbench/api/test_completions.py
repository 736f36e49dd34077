"""Text completions through the official client."""

from __future__ import annotations

from typing import Any

import pytest

from engine.fake_runner import FakeTokenizer, fake_logprobs
from workbench.host import FAKE_ANSWER


def test_default_length_is_sixteen_tokens(server: Any) -> None:
    answer = server.openai.completions.create(model=server.model, prompt="Once")
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (FAKE_ANSWER[:16], "length")
    assert (answer.object, answer.usage.prompt_tokens, answer.usage.completion_tokens) == (
        "text_completion",
        4,
        16,
    )


def test_stream_says_the_same(server: Any) -> None:
    chunks = list(
        server.openai.completions.create(
            model=server.model, prompt="Once", stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(c.choices[0].text for c in chunks[:-1]) == FAKE_ANSWER[:16]
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 16


def test_prompts_are_texts_or_token_ids_one_or_many(server: Any) -> None:
    def ask(prompt: Any) -> Any:
        return server.openai.completions.create(model=server.model, prompt=prompt, max_tokens=1)

    assert ask("ab").usage.prompt_tokens == ask([97, 98]).usage.prompt_tokens == 2
    many = ask(["a", "bcd"])
    assert ([c.index for c in many.choices], many.usage.prompt_tokens) == ([0, 1], 4)
    assert ask([[97], [98, 99]]).usage.prompt_tokens == 3


def test_several_choices_a_prompt_are_numbered_through(server: Any) -> None:
    answer = server.openai.completions.create(model=server.model, prompt=["a", "bcd"], n=2, max_tokens=1)
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.prompt_tokens == 4  # each prompt once


def test_logprobs_have_offsets_into_the_text(server: Any) -> None:
    answer = server.openai.completions.create(model=server.model, prompt="a", max_tokens=5, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert "".join(logprobs.tokens) == FAKE_ANSWER[:5]
    assert logprobs.text_offset == [0, 1, 2, 3, 4]
    assert all(len(top) == 2 for top in logprobs.top_logprobs)
    streamed = server.openai.completions.create(
        model=server.model, prompt="a", max_tokens=5, logprobs=2, stream=True
    )
    assert [o for c in streamed for o in c.choices[0].logprobs.text_offset] == logprobs.text_offset


def entry_of(token: int) -> tuple[float, list[str]]:
    """What the fake model says of a byte: its log-probability, and the two most likely ones."""
    entry = fake_logprobs(token, 2, 256)
    return entry.logprob, [FakeTokenizer().token_text(i) for i in entry.top_ids]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["Once upon", list(b"Once upon")], ids=["text", "ids"])
def test_echo_gives_the_prompt_back_with_its_logprobs(server: Any, prompt: Any, stream: bool) -> None:
    asked = {"model": server.model, "prompt": prompt, "max_tokens": 3, "echo": True, "logprobs": 2}
    answer = server.openai.completions.create(**asked, stream=stream)
    choices = [chunk.choices[0] for chunk in answer] if stream else [answer.choices[0]]
    assert "".join(choice.text for choice in choices) == "Once upon" + FAKE_ANSWER[:3]
    parts = [choice.logprobs for choice in choices if choice.logprobs]
    tokens = [token for part in parts for token in part.tokens]
    logprobs = [p for part in parts for p in part.token_logprobs]
    assert tokens == list("Once upon" + FAKE_ANSWER[:3])
    assert logprobs == [None, *(entry_of(ord(token))[0] for token in tokens[1:])]
    assert [offset for part in parts for offset in part.text_offset] == list(range(12))
    tops = [top for part in parts for top in part.top_logprobs]
    assert tops[0] is None
    assert [list(top) for top in tops[1:]] == [entry_of(ord(token))[1] for token in tokens[1:]]


def test_a_prompt_is_scored_without_generating(server: Any) -> None:
    """As scoring clients ask (lm-eval): log-probabilities of the prompt, nothing behind it."""
    before = server.worker.stats()
    answer = server.openai.completions.create(
        model=server.model, prompt=[[97, 98, 99], [100, 101]], max_tokens=0, echo=True, logprobs=1
    )
    assert [choice.text for choice in answer.choices] == ["abc", "de"]
    assert [choice.finish_reason for choice in answer.choices] == ["length", "length"]
    assert answer.choices[0].logprobs.token_logprobs == [None, entry_of(98)[0], entry_of(99)[0]]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 0)
    after = server.worker.stats()
    assert after.output_tokens == before.output_tokens
    silent = server.openai.completions.create(model=server.model, prompt="abc", max_tokens=0, echo=True)
    assert (silent.choices[0].text, silent.choices[0].logprobs) == ("abc", None)


def test_prompt_logprobs_come_as_vllm_has_them(server: Any) -> None:
    whole = server.post("/v1/completions", prompt=list(b"ab"), max_tokens=1, prompt_logprobs=2).json()
    first, second = whole["choices"][0]["prompt_logprobs"]
    assert first is None
    logprob, _ = entry_of(98)
    assert second == {
        "98": {"logprob": logprob, "rank": 1, "decoded_token": "b"},
        "99": {"logprob": logprob - 0.5, "rank": 2, "decoded_token": "c"},
    }
    assert whole["choices"][0]["text"] == FAKE_ANSWER[0]
    chat = server.post(max_tokens=1, prompt_logprobs=0).json()
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]
    assert [len(each) for each in chat["prompt_logprobs"][1:]] == [1] * (chat["usage"]["prompt_tokens"] - 1)
    assert "prompt_logprobs" not in server.post(max_tokens=1).json()


def test_best_of_tells_n_and_counts_all(real_server: Any) -> None:
    asked = {"model": real_server.model, "prompt": ["Once upon", "In"], "max_tokens": 6, "temperature": 1.0}
    every = real_server.openai.completions.create(**asked, n=5, seed=3, logprobs=0)
    best = real_server.openai.completions.create(**asked, n=2, seed=3, extra_body={"best_of": 5})
    assert [choice.index for choice in best.choices] == [0, 1, 2, 3]
    for prompt in range(2):
        group = every.choices[5 * prompt : 5 * prompt + 5]
        means = {c.text: sum(c.logprobs.token_logprobs) / len(c.logprobs.token_logprobs) for c in group}
        ranked = sorted(group, key=lambda choice: -means[choice.text])
        assert [c.text for c in best.choices[2 * prompt : 2 * prompt + 2]] == [c.text for c in ranked[:2]]
    assert all(choice.logprobs is None for choice in best.choices)
    assert best.usage.completion_tokens == every.usage.completion_tokens
    assert best.usage.prompt_tokens == every.usage.prompt_tokens


def test_models_are_listed_and_described(server: Any) -> None:
    listed = server.openai.models.list().data
    assert [m.id for m in listed] == [server.model]
    assert server.openai.models.retrieve(server.model).id == server.model
    assert listed[0].max_model_len == server.worker.config.max_model_len
