"""`quire chat` against a server: every control reaches the engine, a form is kept, a call is shown, several answers are asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.sampling_params import SamplingParams
from engine.structured_outputs import StructuredOutputsParams
from workbench.cli import main

CONTROLS = {
    "--temperature": "0.7", "--top-k": "9", "--top-p": "0.8", "--min-p": "0.1", "--typical-p": "0.9", "--presence-penalty": "0.5",
    "--frequency-penalty": "-0.5", "--repetition-penalty": "1.2", "--max-tokens": "7", "--min-tokens": "2", "--seed": "5",
    "--stop": "zz", "--stop-token-id": "3", "--bad-word": "never", "--logit-bias": "42:1.5", "--logprobs": "2",
}  # fmt: skip
REACHED = SamplingParams(
    temperature=0.7, top_k=9, top_p=0.8, min_p=0.1, typical_p=0.9, presence_penalty=0.5, frequency_penalty=-0.5,
    repetition_penalty=1.2, max_tokens=7, min_tokens=2, seed=5, stop=("zz",), stop_token_ids=(3,), bad_words=(tuple(b"never"),),
    logit_bias={42: 1.5}, logprobs=2, ignore_eos=True,
)  # fmt: skip


def chat(script: Any, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[dict[str, Any], str]:
    """The facts of one question and what a person sees."""
    assert main(["chat", "Hello", "--url", script.server.url, "--json", *options]) == 0
    told = capsys.readouterr()
    return json.loads(told.out.splitlines()[-1]), told.err


def test_every_control_reaches_the_engine(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    script.says("abcdefghij")
    facts, _ = chat(script, capsys, "--ignore-eos", *(part for pair in CONTROLS.items() for part in pair))
    assert script.last_params() == REACHED
    assert (facts["finish_reason"], facts["completion_tokens"]) == ("length", 7)
    assert [len(token["top_logprobs"]) for token in facts["logprobs"]] == [2] * 7


def test_the_form_of_an_answer_reaches_the_engine(
    script: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "schema.json").write_text('{"type": "object", "properties": {"a": {"type": "integer"}}}')
    (tmp_path / "rules.ebnf").write_text('root ::= "x"')
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    asked = {
        ("--json-schema", str(tmp_path / "schema.json")): {"json": schema},
        ("--json-object", "--compact"): {"json_object": True, "any_whitespace": False},
        ("--regex", "a+"): {"regex": "a+"},
        ("--choice", "x", "--choice", "y"): {"choice": ("x", "y")},
        ("--grammar", str(tmp_path / "rules.ebnf")): {"grammar": 'root ::= "x"'},
    }
    script.says("x")
    for options, form in asked.items():
        chat(script, capsys, *options)
        assert script.last_params().structured_outputs == StructuredOutputsParams.from_dict(form)


def test_calls_are_shown_apart_and_several_answers_have_seeds_of_their_own(
    script: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tools = tmp_path / "tools.json"
    tools.write_text('[{"type": "function", "function": {"name": "weather"}}]')
    call = '<tool_call>{"name": "weather", "arguments": {"city": "Ulm"}}</tool_call>'
    script.says(f"Let me see.{call}", "{# <tool_call> #}")
    facts, seen = chat(script, capsys, "--tools", str(tools), "--n", "2", "--seed", "11")
    [made] = facts["calls"]
    assert (made["name"], json.loads(made["arguments"])) == ("weather", {"city": "Ulm"})
    assert facts["text"] == "Let me see."
    assert "→ weather(" in seen
    assert "<tool_call>" not in seen
    assert [answer["calls"] for answer in facts["others"]] == [[made]]
    assert script.last_params().seed == 12
