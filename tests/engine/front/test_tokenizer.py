"""A model folder's tokenizer: loading, encoding, chat templates, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from engine.errors import InvalidRequestError, ModelLoadError, ModelNotFoundError, UnsupportedModelError
from engine.tokenizer import Tokenizer, TokenizerLike

ROOT = Path(__file__).resolve().parents[3]
CHAT = [{"role": "user", "content": "Hi 🙂"}]


def test_ids_and_text_are_those_of_transformers(tokenizer_folder: Path) -> None:
    ours, theirs = (
        Tokenizer.from_pretrained(tokenizer_folder),
        AutoTokenizer.from_pretrained(tokenizer_folder),
    )
    text = "def f(x): return 'naïve 🙂'  # two words"
    for special in (True, False):
        ids = ours.encode(text, add_special_tokens=special)
        assert ids == theirs.encode(text, add_special_tokens=special)
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.encode("a")[0] == theirs.bos_token_id
    for prompt in (True, False):
        assert ours.apply_chat_template(CHAT, add_generation_prompt=prompt) == theirs.apply_chat_template(
            CHAT, add_generation_prompt=prompt, return_dict=False
        )
    assert ours.vocab_size == len(theirs)
    surface: TokenizerLike = ours
    assert surface.has_chat_template


def test_every_end_of_sequence_id_that_the_folder_names_counts(tokenizer_folder: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder)
    own = tokenizer.encode("</s>", add_special_tokens=False)
    assert own == [1]
    assert tokenizer.eos_token_ids == {1, 2}
    (tokenizer_folder / "generation_config.json").unlink()
    (tokenizer_folder / "config.json").write_text(
        '{"text_config": {"eos_token_id": [7]}, "eos_token_id": null}'
    )
    assert Tokenizer.from_pretrained(tokenizer_folder).eos_token_ids == {1, 7}


def test_tools_reach_the_template_and_their_arguments_come_back_as_values(tokenizer_folder: Path) -> None:
    (tokenizer_folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.arguments['city'] }};{% endfor %}"
        "{{ m.content }}|{% endfor %}{{ tools[0]['function']['name'] }}"
    )
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder)
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    ids = tokenizer.apply_chat_template(
        messages, tools=[{"type": "function", "function": {"name": "weather"}}]
    )
    assert tokenizer.decode(ids) == "one\ntwo|Bern;|weather"
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Bern"}'}, (
        "the caller's message was changed"
    )


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hello", "messages"),
        ({"role": "user", "content": "x"}, "messages"),
        (["hello"], "messages[0]"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": 3, "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "messages[0].content"),
        ([{"role": "assistant", "content": "x", "tool_calls": "f()"}], "messages[0].tool_calls"),
        ([{"role": "judge", "content": "x"}], "messages"),  # the template itself refuses
        ([{"role": "user", "content": "half \ud83d"}], "prompt"),
    ],
)
def test_malformed_messages_are_refused_by_name(tokenizer_folder: Path, messages: object, param: str) -> None:
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder)
    with pytest.raises(InvalidRequestError) as caught:
        tokenizer.apply_chat_template(messages)  # type: ignore[arg-type]
    assert caught.value.param == param


def test_a_model_without_chat_template_says_so(tokenizer_folder: Path) -> None:
    (tokenizer_folder / "chat_template.jinja").unlink()
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder)
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequestError, match="no chat template"):
        tokenizer.apply_chat_template(CHAT)


def test_what_is_no_text_is_refused(tokenizer_folder: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder)
    for bad in ("half of a pair: \udc80", 7, None, b"bytes"):
        with pytest.raises(InvalidRequestError):
            tokenizer.encode(bad)  # type: ignore[arg-type]


def test_missing_and_broken_folders_are_typed_errors(tmp_path: Path, tokenizer_folder: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        Tokenizer.from_pretrained(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    # transformers would make up a tokenizer for this one.
    (empty / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelLoadError, match="holds no tokenizer"):
        Tokenizer.from_pretrained(empty)
    (tokenizer_folder / "tokenizer.json").write_text('{"version": "1.0", "model": ')
    with pytest.raises(ModelLoadError, match="cannot be loaded"):
        Tokenizer.from_pretrained(tokenizer_folder)
    (tokenizer_folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelLoadError, match="not valid JSON"):
        Tokenizer.from_pretrained(tokenizer_folder)


def test_code_that_comes_with_a_model_does_not_run_unasked(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "made_up"}')
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["evil.Evil", None]}})
    )
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Evil: pass\n")
    with pytest.raises(ModelLoadError):
        Tokenizer.from_pretrained(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_in_python_alone_is_refused_by_name() -> None:
    class PurePython:
        eos_token_id = 0

    with pytest.raises(UnsupportedModelError, match="PurePython"):
        Tokenizer(PurePython())


def test_prompts_are_never_cut_or_padded(
    wrapped: Callable[[str], PreTrainedTokenizerFast], tmp_path: Path
) -> None:
    wrapped("byte_level").save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {"strategy": {"Fixed": 16}, "direction": "Right", "pad_id": 0, "pad_type_id": 0,
                          "pad_token": "<s>", "pad_to_multiple_of": None}  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert len(tokenizer.encode("qzx" * 20, add_special_tokens=False)) > 16
    assert len(tokenizer.encode("q", add_special_tokens=False)) == 1


def test_threads_share_one_tokenizer(tokenizer_folder: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder)
    texts = [f"text number {i} 🙂" * 5 for i in range(40)]

    def round_trip(text: str) -> str:
        detokenizer = tokenizer.detokenizer()
        ids = tokenizer.encode(text, add_special_tokens=False)
        return "".join(detokenizer.push((i,)) for i in ids) + detokenizer.flush()

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(round_trip, texts * 5)) == texts * 5


def test_token_text_shows_spaces_and_parts_of_characters(tokenizer_folder: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder)
    first = tokenizer.encode("🏳", add_special_tokens=False)[0]
    assert tokenizer.token_text(first) == "\ufffd"
    assert tokenizer.token_text(tokenizer.encode(" the", add_special_tokens=False)[0]).startswith(" ")
    assert tokenizer.token_text(10**6) == ""


def test_loading_a_generic_tokenizer_brings_no_torch_in(tokenizer_folder: Path) -> None:
    code = (
        "import engine.tokenizer, sys; assert 'transformers' not in sys.modules;"
        f"t = engine.tokenizer.Tokenizer.from_pretrained({str(tokenizer_folder)!r});"
        "t.apply_chat_template([{'role': 'user', 'content': 'x'}]); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
