"""What a body of /v1/responses may hold: OpenAI's Responses API as far as it is served, vLLM's sampling extras, nothing else.

Boundary: shapes and types, as `schema`. What they mean as a conversation is `responses`'.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from workbench.api.schema import Unserved

Status = Literal["in_progress", "completed", "incomplete"] | None


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class InputText(_Strict):
    """A part of a message; of an answer that comes back, with what stood beside its text."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class InputMessage(_Strict):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[InputText]
    id: str | None = None
    status: Status = None
    phase: Literal["commentary", "final_answer"] | None = None


class FunctionCallItem(_Strict):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: Status = None


class FunctionOutputItem(_Strict):
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[InputText]
    id: str | None = None
    status: Status = None


class ReasoningPart(_Strict):
    type: Literal["reasoning_text", "summary_text"]
    text: str


class ReasoningItem(_Strict):
    type: Literal["reasoning"]
    summary: list[ReasoningPart] = []
    content: list[ReasoningPart] | None = None
    id: str | None = None
    status: Status = None
    encrypted_content: None = None


def _kind(item: Any) -> str:
    found = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)
    return f"{found}-item"


InputItem = Annotated[
    Annotated[InputMessage, Tag("message-item")]
    | Annotated[FunctionCallItem, Tag("function_call-item")]
    | Annotated[FunctionOutputItem, Tag("function_call_output-item")]
    | Annotated[ReasoningItem, Tag("reasoning-item")],
    Discriminator(
        _kind,
        custom_error_type="item_type",
        custom_error_message="items are of type message, function_call, function_call_output or reasoning",
    ),
]


class FunctionTool(_Strict):
    type: Literal["function"]
    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionChoice(_Strict):
    type: Literal["function"]
    name: str


class TextFormat(_Strict):
    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")] | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextConfig(_Strict):
    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None  # no model here takes another


class ReasoningConfig(_Strict):
    effort: Literal["none"] | None = None  # no model here takes another
    summary: None = None  # thoughts are told as they are


class ResponsesStreamOptions(_Strict):
    include_obfuscation: Literal[False] | None = None


class ResponsesRequest(_Strict):
    model: str | None = None  # None: the default model
    input: str | Annotated[list[InputItem], Field(min_length=1)]
    instructions: str | None = None
    stream: bool | None = None
    stream_options: ResponsesStreamOptions | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    text: TextConfig | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningConfig | None = None
    include: list[Literal["message.output_text.logprobs"]] | None = None
    top_logprobs: int | None = None
    truncation: Literal["disabled"] | None = None  # what is too long is refused
    # labels of the caller: told again, without effect
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # vLLM's extras, as chat completions have them
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    ignore_eos: bool | None = None
    cache_salt: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


_KEEP = "Leave it out, and send the whole conversation as input: responses are not stored."
UNSERVED: Unserved = {
    "store": ((None, False), "Leave it out: responses are not stored."),
    "previous_response_id": ((None,), _KEEP),
    "conversation": ((None,), _KEEP),
    "background": ((None, False), "Leave it out: an answer lives as long as its connection."),
    "prompt": ((None,), "Leave it out, and send its text as instructions and input."),
    "max_tool_calls": ((None,), "Leave it out: there are no hosted tools, calls are the client's to run."),
    "context_management": ((None, []), "Leave it out: what is too long is refused, not cut."),
    "prompt_cache_retention": ((None, "in_memory"), "Leave it out: prefixes are cached as long as there is room."),
    "max_tokens": ((None,), "Send max_output_tokens."),
    "max_completion_tokens": ((None,), "Send max_output_tokens."),
    "messages": ((None,), "Send input; /v1/chat/completions has messages."),
    "response_format": ((None,), "Send text.format."),
}  # fmt: skip
