"""What a chat model's output says: reasoning, content and tool calls, found as it grows, in the formats that models write.

    parser = make_output_parser(worker.tokenizer, prompt_token_ids, tools)
    for delta in stream:
        show(parser.push(delta.text))
    show(parser.finish())

Boundary: text in, pieces out. Nothing here knows HTTP, pages or engines.
"""

from workbench.chat_output.constrained import Constrained, ForcedCall, as_part, constrain
from workbench.chat_output.parser import OutputParser
from workbench.chat_output.pieces import (
    CallArguments,
    CallBroken,
    CallStart,
    Content,
    ParsedOutput,
    Piece,
    Reasoning,
    ToolCall,
    gather,
)
from workbench.chat_output.syntax import OutputSyntax, make_output_parser, output_syntax

__all__ = [
    "CallArguments",
    "CallBroken",
    "CallStart",
    "Constrained",
    "Content",
    "ForcedCall",
    "OutputParser",
    "OutputSyntax",
    "ParsedOutput",
    "Piece",
    "Reasoning",
    "ToolCall",
    "as_part",
    "constrain",
    "gather",
    "make_output_parser",
    "output_syntax",
]
