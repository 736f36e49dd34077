"""What a request body may hold: OpenAI's fields, vLLM's sampling extras, and nothing else.

Strict on purpose. A field nobody knows is refused by name (a misspelt `temprature` must not be dropped); a field that
OpenAI has and this server cannot serve is accepted only at its neutral value.

Boundary: shapes and types. Ranges belong to ``engine.SamplingParams``, the context's length to the engine.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engine.sampling_params import MAX_CHOICES
from workbench.errors import ApiError, UnsupportedFieldError


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Strict):
    include_usage: bool = False
    continuous_usage_stats: bool = False  # vLLM's: with include_usage, each chunk tells the usage so far


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class FunctionCall(_Strict):
    name: str
    arguments: str | dict[str, Any]


class ToolCall(_Strict):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None  # of an assistant's answer that comes back; `reasoning` is the same
    reasoning: str | None = None
    refusal: None = None


class FunctionDefinition(_Strict):
    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Strict):
    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(_Strict):
    name: str


class NamedToolChoice(_Strict):
    type: Literal["function"]
    function: NamedFunction


class JsonSchemaFormat(_Strict):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class _Generation(_Strict):
    """Fields that both endpoints share."""

    model: str | None = None  # None: the default model
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stop: str | list[str] | None = None
    # the end user, who gets a fair share; the second is OpenAI's older name
    safety_identifier: str | None = None
    user: str | None = None
    # labels of the caller: accepted, without effect
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    # vLLM's extras
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    cache_salt: str | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None  # lower runs earlier
    # what the output must look like: one of them; ``workbench.api.constraints`` reads them
    response_format: ResponseFormat | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None


class ChatRequest(_Generation):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None  # False: reasoning is not told
    chat_template_kwargs: dict[str, Any] | None = (
        None  # the template's own variables, such as enable_thinking
    )


class CompletionRequest(_Generation):
    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = None
    best_of: int | None = None
    echo: bool | None = None


class EmbeddingRequest(_Strict):
    model: str | None = None
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: str | None = None  # the caller's label, without effect
    # vLLM's extras
    truncate_prompt_tokens: int | None = None
    normalize: bool | None = None
    # sentence-transformers': which of the model's own prompts stands before each text
    prompt_name: str | None = None


class Document(_Strict):
    text: str


class RerankRequest(_Strict):
    """Jina's and Cohere's fields, as vLLM has them."""

    model: str | None = None
    query: str
    documents: list[str | Document]
    top_n: int | None = None  # of the results; None and 0: all
    return_documents: bool | None = None
    truncate_prompt_tokens: int | None = None
    user: str | None = None


class ScoreRequest(_Strict):
    """vLLM's fields: text_1 with text_2, by whichever names."""

    model: str | None = None
    text_1: str | list[str] | None = None
    text_2: str | list[str] | None = None
    queries: str | list[str] | None = None
    documents: str | list[str] | None = None
    truncate_prompt_tokens: int | None = None
    user: str | None = None


class TokenizeRequest(_Strict):
    """vLLM's fields: a prompt, or messages with what templates read."""

    OF_MESSAGES: ClassVar = ("add_generation_prompt", "chat_template_kwargs", "tools")

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None  # None: with a prompt, not with messages
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None  # None: yes
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None


class DetokenizeRequest(_Strict):
    model: str | None = None
    tokens: list[int]


class InternalEmbedRequest(_Strict):
    model: str | None = None
    texts: list[str | list[int]]
    params: dict[str, Any] = {}


class InternalRerankRequest(_Strict):
    model: str | None = None
    query: str
    documents: list[str]
    params: dict[str, Any] = {}


class LoadLoraRequest(_Strict):
    """Fields are vLLM's."""

    lora_name: str
    lora_path: str  # a PEFT folder under one of the server's roots
    load_inplace: bool = False  # whether an adapter of that name is replaced


class UnloadLoraRequest(_Strict):
    lora_name: str
    lora_int_id: int | None = None  # vLLM's own number; not looked at


class FeedbackRequest(_Strict):
    """What a person thinks of an answer; the values of each kind are `workbench.observe.feedback`'s to check."""

    request_id: str  # the answer's `id` or its x-request-id header
    kind: str
    value: str | int | float | bool | None = None
    comment: str | None = None
    correction: str | None = None
    user: str | None = None


# OpenAI's and vLLM's fields that are not served: name -> (values without effect, what to do instead).
Unserved = Mapping[str, tuple[tuple[Any, ...], str]]
_NEUTRAL: Unserved = {
    "functions": ((None, []), "Use tools."),
    "function_call": ((None, "auto", "none"), "Use tools and tool_choice."),
    "service_tier": ((None, "auto", "default"), "Leave it out: there is one tier."),
    "store": ((None, False), "Leave it out: responses are not stored."),
    "reasoning_effort": ((None, "none"), "Leave it out: no model here takes it."),
    "verbosity": ((None, "medium"), "Leave it out: no model here takes it."),
    "modalities": ((None, ["text"]), "Leave it out: text is the only modality."),
    "audio": ((None,), "Leave it out: text is the only modality."),
    "prediction": ((None,), "Leave it out: predicted output is not served."),
    "web_search_options": ((None,), "Leave it out: there is no web search."),
    "best_of": ((None, 1), "Use n here; /v1/completions has best_of."),
    "echo": ((None, False), "Leave it out here; /v1/completions has echo."),
    "suffix": ((None, ""), "Leave it out: filling in the middle is not served."),
    "use_beam_search": ((None, False), "Leave it out: beam search is not served."),
    "guided_decoding_backend": ((None, "auto", "xgrammar"), "Leave it out: grammars are xgrammar's."),
    "guided_whitespace_pattern": ((None,), "Leave it out, or use structured_outputs.any_whitespace."),
    "chat_template": ((None,), "Leave it out: the model's own template is used."),
    "add_generation_prompt": ((None, True), "Leave it out."),
    "continue_final_message": ((None, False), "Leave it out."),
}

Body = TypeVar("Body", bound=BaseModel)


def parse(kind: type[Body], raw: Any, unserved: Unserved | None = None) -> Body:
    """Check a decoded JSON body. `unserved`: fields of this endpoint that are accepted at a neutral value alone.

    Raises:
        UnsupportedFieldError: an unknown field, or a known one at a value that is not served.
        ApiError: a value of the wrong type, or a missing field, by its path.
    """
    if not isinstance(raw, dict):
        raise ApiError(
            f"the body must be a JSON object, got {type(raw).__name__}",
            value=type(raw).__name__,
            limit="object",
        )
    known = kind.model_fields
    kept = {}
    for name, value in raw.items():
        if name in known:
            kept[name] = value
        else:
            _check_neutral(name, value, known, {**_NEUTRAL, **(unserved or {})})
    try:
        return kind.model_validate(kept)
    except ValidationError as error:
        raise _api_error(error) from None


def _check_neutral(name: str, value: Any, known: Any, unserved: Unserved) -> None:
    if name not in unserved:
        near = difflib.get_close_matches(name, [*known, *unserved], n=1)
        raise UnsupportedFieldError(
            f"unknown field {name!r}", value=name, limit=sorted(known), param=name,
            remedy=f"Did you mean {near[0]!r}?" if near else f"Fields here: {', '.join(sorted(known))}.",
        )  # fmt: skip
    neutral, remedy = unserved[name]
    if not any((type(value) is type(n) and value == n) or _equal_numbers(value, n) for n in neutral):
        raise UnsupportedFieldError(
            f"{name}={_short(value)} is not supported here",
            value=value,
            limit=neutral,
            param=name,
            remedy=remedy,
        )


def _equal_numbers(a: Any, b: Any) -> bool:
    numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in (a, b))
    return bool(numbers and a == b)


def _api_error(error: ValidationError) -> ApiError:
    # A union reports one complaint per member; the deepest is about the member that was meant.
    first = max(error.errors(include_url=False), key=lambda e: len(e["loc"]))
    path = [str(part) for part in first["loc"] if not _is_union_tag(part)]
    param = ".".join(path)
    if first["type"] == "missing":
        return ApiError(f"field {param!r} is missing", param=param, remedy=f"Send {param}.")
    if first["type"] == "extra_forbidden":
        return UnsupportedFieldError(
            f"unknown field {param!r}", value=path[-1], param=param, remedy="Leave it out."
        )
    value = first.get("input")
    return ApiError(
        f"{param}={_short(value)} is not accepted: {_lower_first(first['msg'])}",
        value=value, limit=first.get("ctx") or first["msg"], param=param,
    )  # fmt: skip


def _is_union_tag(part: str | int) -> bool:
    return isinstance(part, str) and (
        part in ("str", "int", "dict", "TextPart", "NamedToolChoice") or part.endswith(("]", "-item"))
    )


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
