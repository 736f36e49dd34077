"""OutputSyntax: how one model writes reasoning and tool calls, found in its chat template, and what one request allows.

Boundary: from a tokenizer and a request's tools to parsers. Outputs that follow a grammar are `constrained`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from workbench.chat_output.formats import CALL_FORMATS, CallFormat, Schemas, find_call_format
from workbench.chat_output.parser import OutputParser
from workbench.chat_output.pieces import PieceLog
from workbench.chat_output.reasoning import MISTRAL, THINK, ReasoningMarkers, ReasoningTokens

if TYPE_CHECKING:
    from engine.tokenizer import TokenizerLike

_REASONING = {"deepseek_r1": THINK, "qwen3": THINK, "mistral": MISTRAL, "none": None}
_PROMPT_END = 16  # tokens that are enough to see whether a prompt ends with a marker


@dataclass(frozen=True, slots=True)
class OutputSyntax:
    """What to look for in an output; each of a request's outputs gets a parser of its own."""

    calls: CallFormat | None = None
    schemas: Schemas = field(default_factory=dict)
    max_calls: int | None = None
    reasoning: ReasoningMarkers | None = None
    is_open: bool = False  # the prompt ends within reasoning
    reasoning_ids: tuple[int, int] | None = None  # the reasoning markers, where each is one token
    shows_special_tokens: bool = False  # markers may be special tokens: they must be decoded to be found

    @property
    def is_plain(self) -> bool:
        """There is nothing to find."""
        return self.calls is None and self.reasoning is None

    @property
    def stop_after_call(self) -> str | None:
        """The text behind the first call, where only one is allowed and calls end with a marker, which thoughts may hold."""
        if self.calls is None or self.max_calls != 1 or self.reasoning is not None:
            return None
        return self.calls.end or None

    def parser(self) -> OutputParser:
        """A new output's parser."""
        log = PieceLog(self.max_calls, short_ids=self.calls is not None and self.calls.short_ids)
        calls = self.calls.parser(log, self.schemas) if self.calls is not None else None
        return OutputParser(log, calls, self.reasoning, is_open=self.is_open)

    def reasoning_tokens(self) -> ReasoningTokens | None:
        """A new output's counter; None where nothing is to be counted, or markers are no single tokens."""
        return ReasoningTokens(*self.reasoning_ids, is_open=self.is_open) if self.reasoning_ids else None


def output_syntax(
    tokenizer: TokenizerLike,
    prompt_token_ids: Sequence[int] = (),
    tools: Sequence[Mapping[str, Any]] = (),
    *,
    parallel_tool_calls: bool = True,
    tool_call_parser: str | None = None,
    reasoning_parser: str | None = None,
) -> OutputSyntax:
    """What to look for in the answers to a prompt.

    `tools`: OpenAI's tool objects that the model may call; without any, calls are not looked for. `tool_call_parser`,
    `reasoning_parser`: formats by name; None: what the model's chat template shows.
    """
    calls = find_calls(tokenizer, tool_call_parser) if tools else None
    markers = find_reasoning(tokenizer, reasoning_parser)
    return OutputSyntax(
        calls=calls,
        schemas={f["name"]: f.get("parameters") or {} for f in (tool["function"] for tool in tools)},
        max_calls=None if parallel_tool_calls else 1,
        reasoning=markers,
        is_open=markers is not None and ends_with(tokenizer, prompt_token_ids, markers.start),
        reasoning_ids=_ids(tokenizer, markers) if markers is not None else None,
        shows_special_tokens=calls is not None or (markers is not None and _is_hidden(tokenizer, markers)),
    )


def find_calls(tokenizer: TokenizerLike, name: str | None = None) -> CallFormat | None:
    """The format of the model's tool calls, by name or as its chat template and tokenizer have it; None: none is known."""
    found = name or find_call_format(tokenizer)
    return CALL_FORMATS[found] if found is not None else None


def find_reasoning(tokenizer: TokenizerLike, name: str | None = None) -> ReasoningMarkers | None:
    """The markers around the model's reasoning, by name or as its chat template has them; None: it has none."""
    if name is not None:
        return _REASONING[name]
    template = tokenizer.chat_template or ""
    return next((markers for markers in (THINK, MISTRAL) if markers.end in template), None)


def make_output_parser(
    tokenizer: TokenizerLike,
    prompt_token_ids: Sequence[int] = (),
    tools: Sequence[Mapping[str, Any]] = (),
    **more: Any,
) -> OutputParser:
    """A parser for one answer to a prompt; parameters as `output_syntax`."""
    return output_syntax(tokenizer, prompt_token_ids, tools, **more).parser()


def ends_with(tokenizer: TokenizerLike, prompt: Sequence[int], marker: str) -> bool:
    """Whether a prompt ends with a marker, but for white space."""
    end = tokenizer.decode(list(prompt[-_PROMPT_END:]), skip_special_tokens=False)
    return end.rstrip().endswith(marker)


def _ids(tokenizer: TokenizerLike, markers: ReasoningMarkers) -> tuple[int, int] | None:
    start, end = (tokenizer.encode(text, add_special_tokens=False) for text in (markers.start, markers.end))
    return (start[0], end[0]) if len(start) == len(end) == 1 else None


def _is_hidden(tokenizer: TokenizerLike, markers: ReasoningMarkers) -> bool:
    """Whether the end marker is a special token, which is not part of a text otherwise."""
    return markers.end not in tokenizer.decode(tokenizer.encode(markers.end, add_special_tokens=False))
