"""One answer as HTML: text, token probabilities on hover, and its figures. Everything a model said is escaped.

The text is shown as it is, not as Markdown: a model's output must not be able to fetch an image or style the page.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import streamlit as st

from engine.request import FinishReason
from workbench.ui import formats, markup
from workbench.ui.conversations import Answer, TokenView

if TYPE_CHECKING:
    from streamlit.delta_generator import DeltaGenerator

    from engine.records import Completion

MAX_HOVER_TOKENS = 2000  # beyond this an answer is shown without probabilities
_ENDS = {
    FinishReason.STOP: "end of text",
    FinishReason.LENGTH: "token limit",
    FinishReason.ABORT: "stopped",
    FinishReason.ERROR: "error",
}


def show(answer: Answer, slot: DeltaGenerator | None = None, expected: str | None = None) -> bool:
    """Render the answer as it is now, into `slot` if there is one; whether it was shown as ended: it may end at any moment."""
    target, has_ended = slot if slot is not None else st, not answer.running
    target.html(finished(answer, expected) if has_ended else running(answer))
    return has_ended


def running(answer: Answer) -> str:
    if not answer.text:
        return '<div class="q-answer q-muted q-caret" aria-busy="true">waiting for the first token </div>'
    count = f'<div class="q-figures"><span><b>{answer.num_tokens:,}</b> tokens so far</span></div>'
    return f'<div class="q-answer q-caret" aria-busy="true">{markup.text(answer.text)}</div>{count}'


def finished(answer: Answer, expected: str | None = None) -> str:
    tokens = answer.tokens()
    if tokens and len(tokens) <= MAX_HOVER_TOKENS:
        body = f'<div class="q-answer">{"".join(map(_span, tokens))}</div>'
    else:
        body = f'<div class="q-answer">{markup.text(answer.text) or "<span class=q-muted>(no text)</span>"}</div>'
    if answer.error:
        body += markup.panel(
            "bad", "The answer ended with an error", answer.error, (("request", answer.request_id),)
        )
    return body + _figures(answer, expected) + _doubts(tokens)


def _span(token: TokenView) -> str:
    probability = math.exp(token.log_probability)
    css = "q-tok alt" if token.rank > 1 else "q-tok"
    shade = round(45 * (1 - probability))
    tip = markup.text(tooltip(token)).replace("\n", "&#10;")
    if not token.text:
        return f'<span class="q-tok q-end" data-tip="{tip}">end</span>' if token.is_last else ""
    return f'<span class="{css}" style="--d:{shade}%" data-tip="{tip}">{markup.text(token.text)}</span>'


def tooltip(token: TokenView) -> str:
    """The chosen token's probability and rank, then the most likely ones, one a line."""
    lines = [f"{visible(token.text)}  {percent(token.log_probability).strip()}, rank {token.rank}"]
    lines += [f"{percent(logprob)}  {visible(text)}" for text, logprob in token.alternatives]
    return "\n".join(lines)


def percent(logprob: float) -> str:
    return f"{100 * math.exp(logprob):6.2f} %"


def visible(text: str) -> str:
    """A token's text with its white space to be seen."""
    shown = text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣")
    return shown or "(no text)"


def _figures(answer: Answer, expected: str | None) -> str:
    c = answer.completion
    if c is None:
        return ""
    parts = [
        f"{markup.term('TTFT')} <b>{formats.milliseconds(c.ttft_ms)}</b>",
        f"{markup.term('TPOT')} <b>{formats.milliseconds(c.tpot_ms)}</b>",
        f"<b>{formats.significant(1000 / c.tpot_ms if c.tpot_ms else None)}</b> tokens/s",
        f"prompt <b>{c.num_prompt_tokens:,}</b> tokens, <b>{c.num_cached_tokens:,}</b> {markup.term('cached tokens', 'cached')}",
        f"output <b>{c.num_output_tokens:,}</b> tokens",
        markup.text(_end(c)),
        f"seed {c.seed}",
    ]
    if expected is not None:
        same = answer.text.strip() == expected.strip()
        told = "✓ as the task expects" if same else f"≠ the task expects: {expected}"
        parts.append(f'<span class="{"ok" if same else "warn"}">{markup.text(told)}</span>')
    return '<div class="q-figures">' + "".join(f"<span>{part}</span>" for part in parts) + "</div>"


def _end(completion: Completion) -> str:
    label = _ENDS[completion.finish_reason]
    if isinstance(completion.stop_reason, str):
        return f"stop text {completion.stop_reason!r}"
    return label


def _doubts(tokens: tuple[TokenView, ...], most: int = 8) -> str:
    """The least certain tokens as a table: what hover shows, for keyboards and screen readers."""
    unsure = sorted((t for t in tokens if t.text), key=lambda t: t.log_probability)[:most]
    if not unsure:
        return ""
    rows = [
        [
            markup.Cell(visible(t.text)),
            markup.Cell(", ".join(f"{visible(x)} {percent(p).strip()}" for x, p in t.alternatives)),
            markup.Cell(percent(t.log_probability).strip()),
            markup.Cell(str(t.rank)),
        ]
        for t in unsure
    ]
    listed = markup.table(["token", "most likely there", "probability", "rank"], rows, left=2)
    return f'<details class="q-doubt"><summary>least certain tokens</summary>{listed}</details>'
