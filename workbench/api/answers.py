"""What answers hold, as types: the other half of the API's document, beside the bodies of `schema`.

Handlers write answers by hand, because a token costs one f-string; tests hold what they write against these.

Boundary: shapes for people and programs that read the document. Nothing is made or checked with them while requests are served.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Answer(BaseModel):
    """A field with a default may be missing; one that is not named here is never sent."""

    model_config = ConfigDict(extra="forbid")


class ErrorFacts(_Answer):
    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None  # the field, header or setting that is meant
    code: str


class ErrorAnswer(_Answer):
    error: ErrorFacts


class CachedTokens(_Answer):
    cached_tokens: int


class ReasoningTokens(_Answer):
    reasoning_tokens: int


class TokenUsage(_Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: ReasoningTokens | None = None


class TopToken(_Answer):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopToken):
    top_logprobs: list[TopToken]


class ChatLogprobs(_Answer):
    content: list[TokenLogprob]
    refusal: None


class CalledFunction(_Answer):
    name: str
    arguments: str  # JSON


class CalledTool(_Answer):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(_Answer):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[CalledTool] | None = None


class PromptToken(_Answer):
    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptToken] | None]


class ChatChoice(_Answer):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: str | int | None


class ChatCompletion(_Answer):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: TokenUsage
    prompt_logprobs: PromptLogprobs | None = None


class CompletionLogprobs(_Answer):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(_Answer):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None
    prompt_logprobs: PromptLogprobs | None = None


class Completion(_Answer):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: TokenUsage


class OutputText(_Answer):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[TokenLogprob]


class MessageOutput(_Answer):
    type: Literal["message"]
    id: str
    status: Literal["completed", "incomplete"]
    role: Literal["assistant"]
    content: list[OutputText]


class ReasoningText(_Answer):
    type: Literal["reasoning_text"]
    text: str


class ReasoningOutput(_Answer):
    type: Literal["reasoning"]
    id: str
    status: Literal["completed", "incomplete"]
    summary: list[Any]
    content: list[ReasoningText]


class FunctionCallOutput(_Answer):
    type: Literal["function_call"]
    id: str
    status: Literal["completed", "incomplete"]
    call_id: str
    name: str
    arguments: str  # JSON


class InputTokensDetails(_Answer):
    cached_tokens: int
    cache_write_tokens: int


class ResponseUsage(_Answer):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class IncompleteDetails(_Answer):
    reason: Literal["max_output_tokens"]


class ResponseAnswer(_Answer):
    """A response; from `background` on, what was asked for is told again."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["completed", "incomplete"]
    error: None
    incomplete_details: IncompleteDetails | None
    model: str
    output: list[MessageOutput | ReasoningOutput | FunctionCallOutput]
    usage: ResponseUsage
    background: Literal[False]
    conversation: None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: None
    prompt_cache_key: str | None
    reasoning: dict[str, None]
    safety_identifier: str | None
    service_tier: Literal["default"]
    store: Literal[False]
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, str]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    user: str | None


class PooledUsage(_Answer):
    prompt_tokens: int
    total_tokens: int


class EmbeddingEntry(_Answer):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str  # base64 of little-endian float32 where that was asked for


class EmbeddingList(_Answer):
    id: str
    created: int
    model: str
    object: Literal["list"]
    data: list[EmbeddingEntry]
    usage: PooledUsage


class DocumentText(_Answer):
    text: str


class RerankEntry(_Answer):
    index: int
    relevance_score: float
    document: DocumentText | None = None


class RerankAnswer(_Answer):
    id: str
    created: int
    model: str
    results: list[RerankEntry]
    usage: PooledUsage


class ScoreEntry(_Answer):
    object: Literal["score"]
    index: int
    score: float


class ScoreAnswer(_Answer):
    id: str
    created: int
    model: str
    object: Literal["list"]
    data: list[ScoreEntry]
    usage: PooledUsage


class TokenizeAnswer(_Answer):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeAnswer(_Answer):
    prompt: str


class SplitShare(_Answer):
    model: str
    share: float  # of the users
    serving: str | None  # the id of what answers; None: nothing yet


class ModelEntry(_Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["quire"]
    root: str
    max_model_len: int | None
    digest: str | None
    name: str | None
    version: int | None
    aliases: list[str]
    parent: str | None
    deterministic: bool
    task: str
    stored_as: str | None
    quantization: str | None
    split: list[SplitShare] | None = None  # of a name whose traffic is split
    route: list[str] | None = None  # of a name whose requests go to endpoints


class ModelList(_Answer):
    object: Literal["list"]
    data: list[ModelEntry]


class FeedbackAnswer(_Answer):
    id: int
    request_id: str
    created_at: str = Field(description="UTC, ISO 8601; of the last change")
    kind: Literal["thumbs", "score", "comment", "correction"]
    value: str | float | None
    comment: str | None
    correction: str | None
    user: str | None
    sent_at: str | None = Field(description="when it reached MLflow")


class ProbeAnswer(_Answer):
    status: Literal["alive", "failed", "ready", "not ready"]
    phase: str
    message: str
    fraction: float
    model: str | None
    engine: str | None
    models: dict[str, str]


class DocumentAnswer(BaseModel):
    """An OpenAPI document."""

    openapi: str
    info: dict[str, Any]
    paths: dict[str, Any]
    components: dict[str, Any]
