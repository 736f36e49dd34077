"""All sampling controls of a chat, each bound to the page's address so that a link shares them.

Returns checked parameters or the reason why there are none; submits nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import streamlit as st

from engine.errors import InvalidParamsError
from engine.sampling_params import MAX_LOGPROBS, SamplingParams
from workbench.chat_request import Tools
from workbench.ui.components import output_controls
from workbench.ui.glossary import tip

if TYPE_CHECKING:
    from streamlit.delta_generator import DeltaGenerator

DEFAULT_MAX_TOKENS = 256
MAX_ANSWERS = 4  # of one version: more than a person compares
PROMPT_ALTERNATIVES = 3
NONE_LACKING: Mapping[str, str] = MappingProxyType({})
Hint = Callable[..., dict[str, Any]]  # a parameter's help, or why its control is off


@dataclass(frozen=True, slots=True)
class Controls:
    """What is set. `params` is None when a value cannot be used; `error` says which and why."""

    system: str
    params: SamplingParams | None
    error: str | None = None
    tools: Tools = ()


def show(context: int, lacking: Mapping[str, str] = NONE_LACKING) -> Controls:
    """Render the controls; `context` is the model's longest sequence in tokens.

    `lacking`: parameters that somebody who is asked does not take, and why: their controls are off and leave the default.
    """

    def hint(name: str, term: str = "") -> dict[str, Any]:
        return {"disabled": name in lacking, "help": lacking.get(name) or tip(term or name)}

    system = st.text_area(
        "System prompt",
        key="system",
        bind="query-params",
        height=96,
        help=tip("system prompt"),
        placeholder="none",
    )
    temperature = st.slider(
        "Temperature", 0.0, 2.0, 0.0, 0.05, key="temperature", bind="query-params", **hint("temperature")
    )
    left, right = st.columns(2)
    with left:
        top_p = st.number_input(
            "Top p", 0.01, 1.0, 1.0, 0.05, key="top_p", bind="query-params", **hint("top_p")
        )
        max_tokens = st.number_input(
            "Max tokens", 1, context, min(DEFAULT_MAX_TOKENS, context), key="max_tokens", bind="query-params",
            **hint("max_tokens", "max tokens"),
        )  # fmt: skip
        top_k = st.number_input("Top k", 0, None, 0, key="top_k", bind="query-params", **hint("top_k"))
    with right:
        min_p = st.number_input(
            "Min p", 0.0, 1.0, 0.0, 0.01, key="min_p", bind="query-params", **hint("min_p")
        )
        min_tokens = st.number_input(
            "Min tokens",
            0,
            context,
            0,
            key="min_tokens",
            bind="query-params",
            **hint("min_tokens", "min tokens"),
        )
        logprobs = st.number_input(
            "Alternatives", 0, MAX_LOGPROBS, 5, key="logprobs", bind="query-params", **hint("logprobs")
        )
    seed = st.text_input("Seed", key="seed", bind="query-params", **hint("seed"), placeholder="drawn anew")
    stop = st.text_area(
        "Stop texts", key="stop", bind="query-params", height=68, **hint("stop"), placeholder="none"
    )
    ignore_eos = st.toggle("Ignore end of text", key="ignore_eos", bind="query-params", **hint("ignore_eos"))
    advanced = st.expander("Advanced")
    extra, unread = _advanced(advanced, hint)
    with advanced:
        output = output_controls.show()
    extra["structured_outputs"] = output.structured
    params, error = _params(
        lacking, extra=extra, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, max_tokens=max_tokens, min_tokens=min_tokens,
        logprobs=logprobs, seed=seed or "", stop=stop or "", ignore_eos=ignore_eos,
    )  # fmt: skip
    error = unread or error
    if output.structured is not None and "structured_outputs" in lacking:
        error = f"The output's form cannot be asked for: {lacking['structured_outputs']}"
    if error:
        st.error(error, icon="⚠️")
    error = error or output.error
    return Controls(system or "", None if error else params, error, output.tools)


def _advanced(place: DeltaGenerator, hint: Hint) -> tuple[dict[str, Any], str | None]:
    """What changes logits, as SamplingParams has it; and why a text of it cannot be read."""
    with place:
        left, right = st.columns(2)
        presence = left.number_input(
            "Presence penalty", -2.0, 2.0, 0.0, 0.1, key="presence_penalty", bind="query-params", **hint("presence_penalty")
        )  # fmt: skip
        frequency = right.number_input(
            "Frequency penalty", -2.0, 2.0, 0.0, 0.1, key="frequency_penalty", bind="query-params", **hint("frequency_penalty")
        )  # fmt: skip
        repetition = left.number_input(
            "Repetition penalty", 0.01, 10.0, 1.0, 0.05, key="repetition_penalty", bind="query-params", **hint("repetition_penalty")
        )  # fmt: skip
        biases = right.text_input(
            "Logit bias", key="logit_bias", bind="query-params", **hint("logit_bias"), placeholder="id: bias, …"
        )  # fmt: skip
        typical = left.number_input(
            "Typical p", 0.01, 1.0, 1.0, 0.05, key="typical_p", bind="query-params", **hint("typical_p")
        )  # fmt: skip
        n = right.number_input("Answers", 1, MAX_ANSWERS, 1, key="n", bind="query-params", **hint("n"))
        allowed = left.text_input(
            "Allowed ids", key="allowed_token_ids", bind="query-params", **hint("allowed_token_ids"), placeholder="id, …"
        )  # fmt: skip
        stops = right.text_input(
            "Stop ids", key="stop_token_ids", bind="query-params", **hint("stop_token_ids"), placeholder="id, …"
        )  # fmt: skip
        scores_prompt = st.toggle(
            "Prompt probabilities", key="prompt_logprobs", bind="query-params", **hint("prompt_logprobs")
        )
        words = st.text_area(
            "Bad words", key="bad_words", bind="query-params", height=68, **hint("bad_words"), placeholder="none"
        )  # fmt: skip
    extra: dict[str, Any] = {
        "presence_penalty": round(presence, 4),
        "frequency_penalty": round(frequency, 4),
        "repetition_penalty": round(repetition, 4),
        "typical_p": round(typical, 4),
        "n": n,
        "prompt_logprobs": PROMPT_ALTERNATIVES if scores_prompt else None,
        "bad_words": tuple(line for line in (words or "").splitlines() if line.strip()),
    }
    try:
        pairs = [pair.split(":") for pair in (biases or "").split(",") if pair.strip()]
        extra["logit_bias"] = {int(token): float(bias) for token, bias in pairs} or None
    except ValueError:
        return extra, f"Logit bias must read like 42: 5, 7: -100, got {biases!r}."
    try:
        extra["allowed_token_ids"] = _ids(allowed) or None
        extra["stop_token_ids"] = _ids(stops)
    except ValueError:
        return extra, f"Token ids must read like 42, 7, got {allowed or stops!r}."
    return extra, None


def _ids(text: str | None) -> tuple[int, ...]:
    return tuple(int(token) for token in (text or "").split(",") if token.strip())


def _params(
    lacking: Mapping[str, str],
    *,
    extra: dict[str, Any],
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float,
    max_tokens: int,
    min_tokens: int,
    logprobs: int,
    seed: str,
    stop: str,
    ignore_eos: bool,
) -> tuple[SamplingParams | None, str | None]:
    try:
        number = int(seed) if seed.strip() else None
    except ValueError:
        return None, f"Seed must be a whole number or empty, got {seed!r}."
    try:
        given = dict(
            temperature=round(temperature, 4), top_p=top_p, top_k=top_k, min_p=min_p, max_tokens=max_tokens,
            min_tokens=min_tokens, logprobs=logprobs, seed=number, ignore_eos=ignore_eos,
            stop=tuple(line for line in stop.splitlines() if line), **extra,
        )  # fmt: skip
        params = SamplingParams(**{name: value for name, value in given.items() if name not in lacking})
    except InvalidParamsError as error:
        return None, str(error)
    return params, None
