"""Text completions through the official client."""

from __future__ import annotations

from typing import Any

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


def test_models_are_listed_and_described(server: Any) -> None:
    listed = server.openai.models.list().data
    assert [m.id for m in listed] == [server.model]
    assert server.openai.models.retrieve(server.model).id == server.model
    assert listed[0].max_model_len == server.worker.config.max_model_len
