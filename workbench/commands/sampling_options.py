"""Every sampling control, form of the output, and tools, as options of a command. Ranges are SamplingParams' to check."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import SettingsError

if TYPE_CHECKING:
    from workbench.chat_request import ChatOptions

_NUMBERS: tuple[tuple[str, type, str], ...] = (
    ("temperature", float, "0 (default) takes the most likely token, 1 samples the model's own distribution"),
    ("top_k", int, "keep the k most likely tokens"),
    ("top_p", float, "keep the smallest set whose probability reaches p"),
    ("min_p", float, "drop tokens less likely than this share of the most likely one"),
    ("typical_p", float, "keep the most typical tokens, up to this probability"),
    ("presence_penalty", float, "-2 … 2"),
    ("frequency_penalty", float, "-2 … 2"),
    ("repetition_penalty", float, "above 1 discourages what was there"),
    ("max_tokens", int, "of the answer at most (default 256)"),
    ("min_tokens", int, "no end before so many"),
    ("seed", int, "the same seed, prompt and options give the same answer"),
    ("n", int, "answers, one after the other, with the seed, the seed plus 1, …"),
    ("logprobs", int, "with --json: likely alternatives of each token"),
)
_LISTS: tuple[tuple[str, type, str, str], ...] = (
    ("stop", str, "stop", "a text that ends the answer"),
    ("stop_token_ids", int, "stop-token-id", "a token that ends it"),
    ("bad_words", str, "bad-word", "a text that the answer must not hold"),
    ("allowed_token_ids", int, "allowed-token-id", "the only tokens that may be chosen"),
)
_FORMS = {
    "json": ("--json-schema", "FILE", "a JSON schema"),
    "regex": ("--regex", "PATTERN", "a regular expression"),
    "grammar": ("--grammar", "FILE", "an EBNF grammar with the rule `root`"),
}


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options; `chosen` reads them."""
    sampling = parser.add_argument_group("sampling")
    for name, kind, text in _NUMBERS:
        sampling.add_argument(f"--{name.replace('_', '-')}", type=kind, help=text)
    for name, kind, option, text in _LISTS:
        sampling.add_argument(
            f"--{option}", dest=name, type=kind, action="append", help=f"{text}; may be repeated"
        )
    sampling.add_argument(
        "--logit-bias", action="append", metavar="ID:BIAS", help="added to a token's logit; may be repeated"
    )
    sampling.add_argument(
        "--ignore-eos", action="store_true", help="go on when the model says that it is done"
    )
    output = parser.add_argument_group("output")
    for option, value, text in _FORMS.values():
        output.add_argument(option, metavar=value, help=f"the answer follows {text}")
    output.add_argument("--json-object", action="store_true", help="the answer is any JSON object")
    output.add_argument("--compact", action="store_true", help="JSON without blanks between its parts")
    output.add_argument("--choice", action="append", help="the answer is one of these; may be repeated")
    output.add_argument("--tools", type=Path, metavar="FILE", help="a JSON list of OpenAI's tool definitions")


def chosen(arguments: argparse.Namespace) -> ChatOptions:
    """What was given, checked.

    Raises:
        InvalidParamsError, ApiError: a value, a form or a tool that cannot be, by its name.
        SettingsError: a file that cannot be read.
    """
    from engine.sampling_params import SamplingParams
    from workbench.chat_request import ChatOptions, read_tools

    numbers = {name: getattr(arguments, name) for name, _, _ in _NUMBERS}
    lists = {name: getattr(arguments, name) for name, *_ in _LISTS}
    given: dict[str, Any] = {name: tuple(value) if name in lists else value
             for name, value in {**numbers, **lists}.items() if value is not None}  # fmt: skip
    defaults: dict[str, Any] = {"max_tokens": 256, "temperature": 0.0, "ignore_eos": arguments.ignore_eos}
    biases, structured = _biases(arguments.logit_bias), _structured(arguments)
    params = SamplingParams(**{**defaults, **given}, logit_bias=biases, structured_outputs=structured)
    tools = () if arguments.tools is None else read_tools(_text_of(arguments.tools, "tools"))
    return ChatOptions(params, tools)


def _biases(given: list[str] | None) -> dict[int, float] | None:
    try:
        pairs = [pair.split(":") for pair in given or ()]
        return {int(token): float(bias) for token, bias in pairs} or None
    except ValueError:
        raise SettingsError(
            f"--logit-bias {given} cannot be read", value=given, limit="ID:BIAS", param="logit_bias",
            remedy="Write it like --logit-bias 42:5 --logit-bias 7:-100.",
        ) from None  # fmt: skip


def _structured(arguments: argparse.Namespace) -> Any:
    from engine.structured_outputs import StructuredOutputsParams

    schema, grammar = arguments.json_schema, arguments.grammar
    asked = {
        "json": None if schema is None else _text_of(Path(schema), "json_schema"),
        "json_object": arguments.json_object or None,
        "regex": arguments.regex,
        "choice": tuple(arguments.choice) if arguments.choice else None,
        "grammar": None if grammar is None else _text_of(Path(grammar), "grammar"),
    }
    given = {name: value for name, value in asked.items() if value is not None}
    if arguments.compact:
        given["any_whitespace"] = False
    return StructuredOutputsParams.from_dict(given) if given else None


def _text_of(file: Path, param: str) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"{file} cannot be read ({error})", value=str(file), param=param, remedy="Name a UTF-8 text file."
        ) from None
