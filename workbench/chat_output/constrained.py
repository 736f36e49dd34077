"""constrain: an output that has to look like something, told to its grammar as a whole: reasoning first where the model reasons,
then the answer or the calls.

Boundary: the request's own wish comes as StructuredOutputsParams; who asks for what is the API's and the page's matter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from engine.errors import InvalidParamsError
from engine.structural_tag import json_part
from engine.structured_outputs import StructuredOutputsParams
from workbench.chat_output.formats import CallFormat
from workbench.chat_output.reasoning import ReasoningMarkers
from workbench.chat_output.syntax import OutputSyntax, ends_with, find_reasoning, output_syntax

if TYPE_CHECKING:
    from engine.tokenizer import TokenizerLike

Part = dict[str, Any]  # of a structural tag
_GAP: Part = {  # between reasoning and answer, as models and templates write it
    "type": "optional",
    "content": {
        "type": "or",
        "elements": [{"type": "const_string", "value": text} for text in ("\n\n", "\n")],
    },
}


@dataclass(frozen=True, slots=True)
class ForcedCall:
    """All of the output is a call, or several."""

    form: CallFormat  # how they are written where nothing stands before them
    opening: str = ""  # what stands before one in the model's own form
    part: Part | None = None  # the same with its opening and its end; None: it has neither


@dataclass(frozen=True, slots=True)
class Constrained:
    """What to submit, and how to read what comes."""

    prompt_token_ids: list[int]
    structured: StructuredOutputsParams
    syntax: OutputSyntax


def constrain(
    tokenizer: TokenizerLike,
    prompt_token_ids: Sequence[int],
    structured: StructuredOutputsParams,
    tools: Sequence[Mapping[str, Any]] = (),
    *,
    forced: ForcedCall | None = None,
    parallel_tool_calls: bool = True,
    tool_call_parser: str | None = None,
    reasoning_parser: str | None = None,
) -> Constrained:
    """The request for an output that `structured` describes, which holds calls of `tools` in the model's own form, or is a forced call.

    Raises:
        InvalidParamsError: a compact answer of a model that reasons before it.
    """
    markers = find_reasoning(tokenizer, reasoning_parser)
    thought = _thought(tokenizer, prompt_token_ids, markers)
    if thought is None or markers is None:
        max_calls = None if parallel_tool_calls else 1
        if forced is not None:
            syntax = OutputSyntax(forced.form, max_calls=max_calls)
        elif tools:
            syntax = output_syntax(
                tokenizer, (), tools, parallel_tool_calls=parallel_tool_calls, tool_call_parser=tool_call_parser,
                reasoning_parser="none",
            )  # fmt: skip
        else:
            syntax = OutputSyntax()
        written = tokenizer.encode(forced.opening, add_special_tokens=False) if forced is not None else []
        return Constrained([*prompt_token_ids, *written], structured, syntax)
    if forced is None and structured.json is not None and not structured.any_whitespace:
        raise InvalidParamsError(
            "structured_outputs.any_whitespace cannot be false where the model reasons before its answer", value=False,
            limit=True, param="structured_outputs.any_whitespace",
            remedy="Leave it out, or turn reasoning off in the prompt (chat_template_kwargs, for models whose template can).",
        )  # fmt: skip
    is_own = forced is None or forced.part is not None
    syntax = output_syntax(
        tokenizer, prompt_token_ids, tools if is_own else (), parallel_tool_calls=parallel_tool_calls,
        tool_call_parser=tool_call_parser, reasoning_parser=reasoning_parser,
    )  # fmt: skip
    if forced is not None and forced.part is None:
        syntax = replace(syntax, calls=forced.form)
    part = forced.part if forced is not None and forced.part is not None else as_part(structured)
    tag = {"format": {"type": "sequence", "elements": [thought, _GAP, part]}}
    return Constrained([*prompt_token_ids], StructuredOutputsParams(structural_tag=json.dumps(tag)), syntax)


def as_part(structured: StructuredOutputsParams) -> Part:
    """What a whole output has to look like, as a part of one."""
    if structured.json is not None:
        return json_part(structured.json)
    if structured.json_object:
        return json_part({"type": "object"})
    if structured.regex is not None:
        return {"type": "regex", "pattern": structured.regex}
    if structured.choice is not None:
        texts = [{"type": "const_string", "value": text} for text in structured.choice]
        return {"type": "or", "elements": texts}
    if structured.grammar is not None:
        return {"type": "grammar", "grammar": structured.grammar}
    assert structured.structural_tag is not None
    part: Part = json.loads(structured.structural_tag)["format"]
    return part


def _thought(
    tokenizer: TokenizerLike, prompt: Sequence[int], markers: ReasoningMarkers | None
) -> Part | None:
    """The reasoning that an output may begin with; None where the prompt has closed it, or the model has none."""
    if markers is None or ends_with(tokenizer, prompt, markers.end):
        return None
    thought = {"type": "tag", "content": {"type": "any_text"}, "end": markers.end}
    if ends_with(tokenizer, prompt, markers.start):
        return thought | {"begin": ""}
    return {"type": "optional", "content": thought | {"begin": markers.start}}
