"""The tokenizer survives round trips, and the shipped chat template writes exactly what training encodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from workbench.versions.demo.chat_format import SPECIAL_TOKENS, encode, render, split_tool_call
from workbench.versions.demo.evaluate import prompt_ids
from workbench.versions.demo.generator import make_episode
from workbench.versions.demo.tokenizer import save_tokenizer, train_tokenizer, training_texts
from workbench.versions.demo.values import Split

DIALOGUES: dict[str, list[list[dict[str, Any]]]] = {
    "tiny": [
        [
            {"role": "system", "content": "chat"},
            {"role": "user", "content": "Hi, what is your name?"},
            {"role": "assistant", "content": "I am a teapot, nice to meet you!"},
        ]
    ]
    * 3
}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    trained = train_tokenizer(training_texts(DIALOGUES, seed=0, num_episodes=200), vocab_size=700)
    save_tokenizer(trained, folder, 2048)
    return folder


@pytest.fixture(scope="module")
def fast(tokenizer_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)


@pytest.mark.parametrize(
    "text", ["plain words", "Zürich – 東京 🙂\n\ttab", '{"a":"b","c":[1,2.50]}', "  two  spaces ", "é"]
)
def test_any_text_survives_a_round_trip(fast: Any, text: str) -> None:
    assert fast.decode(fast.encode(text)) == text


def test_digits_are_single_tokens(fast: Any) -> None:
    assert [fast.decode([i]) for i in fast.encode("90417")] == list("90417")


def test_special_tokens_have_the_first_ids_and_their_roles(fast: Any) -> None:
    assert fast.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(len(SPECIAL_TOKENS)))
    assert (fast.eos_token, fast.bos_token, fast.pad_token) == ("<|end|>", "<|bos|>", "<|pad|>")


def conversations() -> list[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    episodes = [make_episode(4, index, split) for index in range(60) for split in Split]
    return [(episode.messages, episode.tools) for episode in episodes]


def test_chat_template_equals_the_training_encoding(fast: Any) -> None:
    cases = [*conversations(), (DIALOGUES["tiny"][0], [])]
    for messages, tools in cases:
        ours = encode(fast.backend_tokenizer, messages, tools)
        theirs = fast.apply_chat_template(messages, tools=tools or None, tokenize=True, return_dict=False)
        assert theirs == ours.ids
        assert len(ours.is_answer) == len(ours.ids)


def test_generation_prompt_equals_the_evaluation_prompt(fast: Any) -> None:
    for index in range(40):
        for task in make_episode(8, index, Split.HELD_OUT).tasks():
            theirs = fast.apply_chat_template(
                list(task.messages),
                tools=list(task.tools) or None,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
            )
            assert theirs == prompt_ids(fast.backend_tokenizer, task)


def test_only_answers_are_marked_and_they_hold_the_end_token(fast: Any) -> None:
    messages = DIALOGUES["tiny"][0]
    encoded = encode(fast.backend_tokenizer, messages)
    learned = [i for i, answer in zip(encoded.ids, encoded.is_answer, strict=True) if answer]
    assert fast.decode(learned) == messages[-1]["content"] + "<|end|>"


def test_template_takes_arguments_as_an_object_too(fast: Any) -> None:
    def text(arguments: Any) -> str:
        call = {"type": "function", "function": {"name": "get_weather", "arguments": arguments}}
        messages = [
            {"role": "user", "content": "Weather in Bodako?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": '{"sky":"rainy"}'},
        ]
        assert "".join(s.text for s in render(messages)) == fast.apply_chat_template(messages, tokenize=False)
        return str(fast.apply_chat_template(messages, tokenize=False))

    assert text({"city": "Bodako", "days": 2}) == text('{"city":"Bodako","days":2}')


def test_template_refuses_an_unknown_role(fast: Any) -> None:
    with pytest.raises(Exception, match="role must be"):
        fast.apply_chat_template([{"role": "wizard", "content": "x"}], tokenize=False)


@pytest.mark.parametrize(
    "text",
    [
        "hello",
        "<|tool_call|>{<|/tool_call|>",
        '<|tool_call|>{"name":1,"arguments":{}}<|/tool_call|>',
        "<|tool_call|>[]<|/tool_call|>",
    ],
)
def test_what_is_no_tool_call_parses_to_none(text: str) -> None:
    assert split_tool_call(text) is None
