"""/tokenize and /detokenize: a model's tokens of a text or a conversation, and the text of tokens, in vLLM's forms.

Boundary: HTTP. Nothing is submitted to an engine: a model is asked for its tokenizer and the length of its context alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from workbench.api.endpoints import maybe_off_loop, template_message, tokenizer_of
from workbench.api.errors import json_response
from workbench.api.intake import read_json, take_request_id
from workbench.api.schema import Body, DetokenizeRequest, TokenizeRequest, parse
from workbench.errors import ApiError
from workbench.host import EngineHost
from workbench.settings import Settings

if TYPE_CHECKING:
    from engine.tokenizer import TokenizerLike

_INLINE_TOKENS = 5_000  # more of them are turned into text in a thread, beside the event loop
T = TypeVar("T")


class TokenizationRoutes:
    """The handlers, with what they need."""

    def __init__(self, host: EngineHost, settings: Settings) -> None:
        self._host = host
        self._max_body_bytes = settings.max_body_bytes

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize: of a prompt, or of messages as the chat template renders them. `token_strs` are texts, not vocabulary entries."""
        body, request_id = await self._read(request, TokenizeRequest)
        worker = self._host.worker(body.model)
        tokenizer = tokenizer_of(worker)
        size, work = _encoding(body, tokenizer)
        tokens = await maybe_off_loop(size, work)
        names = None
        if body.return_token_strs:
            names = await _beside(tokens, lambda: [tokenizer.token_text(each) for each in tokens])
        found = {
            "count": len(tokens), "max_model_len": worker.config.max_model_len, "tokens": tokens, "token_strs": names,
        }  # fmt: skip
        return json_response(found, headers={"x-request-id": request_id})

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize: special tokens are shown, so that tokenizing the text again gives the same tokens."""
        body, request_id = await self._read(request, DetokenizeRequest)
        tokenizer = tokenizer_of(self._host.worker(body.model))
        size = tokenizer.vocab_size
        outside = next((i for i, token in enumerate(body.tokens) if not 0 <= token < size), None)
        if outside is not None:
            raise ApiError(
                f"token id {body.tokens[outside]} is outside the vocabulary of {size}", value=body.tokens[outside],
                limit=size - 1, param=f"tokens.{outside}", remedy="Send ids of this model's tokenizer.",
            )  # fmt: skip
        text = await _beside(body.tokens, lambda: tokenizer.decode(body.tokens, skip_special_tokens=False))
        return json_response({"prompt": text}, headers={"x-request-id": request_id})

    async def _read(self, request: Request, kind: type[Body]) -> tuple[Body, str]:
        request_id = take_request_id(request)
        return parse(kind, await read_json(request, self._max_body_bytes)), request_id


def _encoding(body: TokenizeRequest, tokenizer: TokenizerLike) -> tuple[int, Callable[[], list[int]]]:
    """How many characters there are, and what makes tokens of them."""
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(
            "one of prompt and messages is needed, not both", param="prompt", limit="prompt or messages",
            remedy="Send one of them.",
        )  # fmt: skip
    if body.prompt is not None:
        text, special = body.prompt, body.add_special_tokens is not False
        refused = next(
            (name for name in TokenizeRequest.OF_MESSAGES if getattr(body, name) is not None), None
        )
        if refused is not None:
            raise ApiError(
                f"{refused} needs messages", param=refused, remedy="Leave it out, or send messages."
            )
        return len(text), lambda: tokenizer.encode(text, special)
    if body.add_special_tokens:
        raise ApiError(
            "add_special_tokens=True does not go with messages: the chat template writes what the model expects",
            value=True, limit=False, param="add_special_tokens", remedy="Leave it out.",
        )  # fmt: skip
    messages = [template_message(message) for message in body.messages or ()]
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    return sum(len(message["content"]) for message in messages), lambda: tokenizer.apply_chat_template(
        messages, tools=tools or None, add_generation_prompt=body.add_generation_prompt is not False,
        chat_template_kwargs=body.chat_template_kwargs,
    )  # fmt: skip


async def _beside(tokens: Sequence[Any], work: Callable[[], T]) -> T:
    return work() if len(tokens) < _INLINE_TOKENS else await asyncio.to_thread(work)
