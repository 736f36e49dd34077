"""The conversation as a request that others can send: curl and Python, for the same server, model and settings.

Both texts are complete: pasted into a shell or a file they run; where the server asks for API keys, with the one in QUIRE_API_KEY.
Values are quoted for their language.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import streamlit as st

from engine.sampling_params import SamplingParams
from engine.structured_outputs import KINDS, StructuredOutputsParams

_DEFAULTS = SamplingParams(max_tokens=None)
_OPENAI = (
    "temperature",
    "top_p",
    "max_tokens",
    "n",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "stop",
)
_OURS = (  # not in OpenAI's API: `extra_body` in its client
    "top_k", "min_p", "typical_p", "min_tokens", "ignore_eos", "repetition_penalty", "bad_words", "allowed_token_ids",
    "stop_token_ids", "prompt_logprobs", "structured_outputs",
)  # fmt: skip


def show(
    asked: Mapping[str, Sequence[Mapping[str, Any]]],
    params: SamplingParams,
    tools: Sequence[Mapping[str, Any]] = (),
    *,
    needs_key: bool = False,
) -> None:
    """A popover with both texts, each with its copy button; `asked` has the messages for each version that can be chosen."""
    with st.popover("Copy as code", help="The same request over the API, as curl or Python"):
        model = next(iter(asked))
        if len(asked) > 1:
            model = st.selectbox("Version", list(asked), key="copy_for")
        in_shell, in_python = st.tabs(["curl", "Python"])
        base = base_url(st.context.url)
        shell = as_curl(base, model, asked[model], params, tools, needs_key=needs_key)
        in_shell.code(shell, language="bash", wrap_lines=True)
        python = as_python(base, model, asked[model], params, tools, needs_key=needs_key)
        in_python.code(python, language="python", wrap_lines=True)


def base_url(page_url: str | None) -> str:
    """The API's address on the server that shows this page."""
    parts = urlsplit(page_url or "http://127.0.0.1:8501")
    return f"{parts.scheme}://{parts.netloc}/v1"


def settings(params: SamplingParams) -> dict[str, Any]:
    """What differs from the API's defaults, and always the temperature."""
    chosen = {name: getattr(params, name) for name in (*_OPENAI, *_OURS)}
    kept = {k: v for k, v in chosen.items() if k == "temperature" or v != getattr(_DEFAULTS, k)}
    for name in {"stop", "bad_words", "allowed_token_ids", "stop_token_ids"} & set(kept):
        kept[name] = list(kept[name])
    if "logit_bias" in kept:
        kept["logit_bias"] = {str(token): bias for token, bias in kept["logit_bias"].items()}
    if params.structured_outputs is not None:
        kept["structured_outputs"] = _structured(params.structured_outputs)
    if params.logprobs is not None:
        kept |= {"logprobs": True, "top_logprobs": params.logprobs}
    return kept


def _structured(asked: StructuredOutputsParams) -> dict[str, Any]:
    """In vLLM's form; a schema as the object that it is."""
    given = {name: getattr(asked, name) for name in KINDS if getattr(asked, name) not in (None, False)}
    if asked.json is not None:
        given["json"] = json.loads(asked.json)
    if asked.choice is not None:
        given["choice"] = list(asked.choice)
    if not asked.any_whitespace:
        given["disable_any_whitespace"] = True
    return given


def as_curl(
    base: str,
    model: str,
    messages: Sequence[Mapping[str, Any]],
    params: SamplingParams,
    tools: Sequence[Mapping[str, Any]] = (),
    *,
    needs_key: bool = False,
) -> str:
    body = {
        "model": model,
        "messages": list(messages),
        **settings(params),
        **({"tools": list(tools)} if tools else {}),
    }
    data = shlex.quote(json.dumps(body, ensure_ascii=False, indent=2))
    key = ' \\\n  -H "Authorization: Bearer $QUIRE_API_KEY"' if needs_key else ""
    return f"curl {base}/chat/completions \\\n  -H 'Content-Type: application/json'{key} \\\n  -d {data}"


def as_python(
    base: str,
    model: str,
    messages: Sequence[Mapping[str, Any]],
    params: SamplingParams,
    tools: Sequence[Mapping[str, Any]] = (),
    *,
    needs_key: bool = False,
) -> str:
    given = settings(params)
    extra = {name: given.pop(name) for name in _OURS if name in given}
    arguments = {"model": model, "messages": [dict(m) for m in messages], **given}
    if tools:
        arguments["tools"] = [dict(tool) for tool in tools]
    if extra:
        arguments["extra_body"] = extra
    key = 'os.environ["QUIRE_API_KEY"]' if needs_key else "'none'"
    lines = [f"    {name}={value!r}," for name, value in arguments.items()]
    return "\n".join(
        [
            *(["import os", ""] if needs_key else []),
            "from openai import OpenAI",
            "",
            f"client = OpenAI(base_url={base!r}, api_key={key})",
            "answer = client.chat.completions.create(",
            *lines,
            ")",
            "print(answer.choices[0].message.content)",
        ]
    )
