"""One answer as HTML: reasoning, text with token probabilities on hover, tool calls, and its figures. Everything a model said is escaped.

The text is shown as it is, not as Markdown: a model's output must not be able to fetch an image or style the page.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from engine.request import FinishReason
from workbench.chat_output import ParsedOutput
from workbench.ui import formats, markup
from workbench.ui.answers import Answer, TokenView
from workbench.ui.components.text_diff import readable
from workbench.ui.output_shape import shape_of

if TYPE_CHECKING:
    from streamlit.delta_generator import DeltaGenerator

    from engine.records import Completion

MAX_HOVER_TOKENS = 2000  # beyond this an answer is shown without probabilities
_ENDS = {
    FinishReason.STOP: "end of text",
    FinishReason.LENGTH: "token limit",
    FinishReason.ABORT: "stopped",
    FinishReason.ERROR: "error",
    FinishReason.TIMEOUT: "waited too long",
}
_SIGNS = {"ok": "✓ ", "warn": "! ", "bad": "✕ ", "": ""}


def show(answer: Answer, slot: DeltaGenerator, expected: str | None = None) -> bool:
    """Render the answer as it is now into `slot`; whether it was shown as ended: it may end at any moment."""
    has_ended = not answer.running
    if has_ended and answer.painted is None:
        answer.painted = finished(answer, expected)
    slot.html(answer.painted or running(answer))
    return has_ended


def running(answer: Answer) -> str:
    """The answer as it grows. Reasoning is open until something follows it."""
    if not answer.text:
        return '<div class="q-answer q-muted q-caret" aria-busy="true">waiting for the first token </div>'
    output = answer.output
    thinks = not (output.content or output.calls)
    body = _reasoning(answer, markup.text(output.reasoning), is_open=thinks)
    said = f'<div class="q-answer q-caret" aria-busy="true">{markup.text(output.content)}</div>'
    count = f'<div class="q-figures"><span><b>{answer.num_tokens:,}</b> tokens so far</span></div>'
    return body + said + _calls(output) + count


def finished(answer: Answer, expected: str | None = None) -> str:
    if answer.refusal is not None:
        return markup.error_panel("The request was refused", answer.refusal)
    tokens = answer.tokens()
    hovered = tokens if len(tokens) <= MAX_HOVER_TOKENS else ()
    output = answer.output
    thought, end = _with_probabilities(output.reasoning, answer.text, 0, hovered)
    said, _ = _with_probabilities(output.content, answer.text, end, hovered)
    if hovered and hovered[-1].is_last and not hovered[-1].text:
        said += _span(hovered[-1])
    body = _reasoning(answer, thought)
    if output.content or not output.calls:
        body += f'<div class="q-answer">{said or "<span class=q-muted>(no text)</span>"}</div>'
    body += _calls(output)
    if answer.error:
        body += markup.panel(
            "bad", "The answer ended with an error", answer.error, (("request", answer.request_id),)
        )
    return body + _figures(answer, expected) + _doubts(tokens) + _prompt(answer.prompt_tokens())


def _with_probabilities(part: str, text: str, start: int, tokens: tuple[TokenView, ...]) -> tuple[str, int]:
    """`part` as HTML, token by token where it is one piece of `text` at or behind `start`; and where it ends there."""
    found = text.find(part, start)
    if found < 0 or not tokens:
        return markup.text(part), start
    spans, place, end = [], 0, found + len(part)
    for token in tokens:
        piece = token.text[max(found - place, 0) : max(end - place, 0)]
        place += len(token.text)
        if piece:
            spans.append(_span(token, piece))
    return "".join(spans), end


def _reasoning(answer: Answer, thought: str, is_open: bool = False) -> str:
    """`thought` (HTML) folded away, with what it took."""
    if not thought:
        return ""
    took = f"{answer.num_reasoning_tokens:,} tokens, {formats.significant(answer.reasoning_ms / 1e3)} s"
    return (
        f'<details class="q-reasoning"{" open" if is_open else ""}><summary>Reasoning <span>{took}</span></summary>'
        f'<div class="q-answer">{thought}</div></details>'
    )


def _calls(output: ParsedOutput) -> str:
    return "".join(
        f'<div class="q-call"><b>{markup.text(call.name)}</b><pre>{markup.text(readable(call.arguments))}</pre></div>'
        for call in output.calls
    )


def _span(token: TokenView, piece: str = "") -> str:
    """One token as it is hovered over; `piece` is what is shown of it, nothing of the end of the text."""
    probability = math.exp(token.log_probability)
    css = "q-tok alt" if token.rank > 1 else "q-tok"
    shade = round(45 * (1 - probability))
    tip = markup.text(tooltip(token)).replace("\n", "&#10;")
    if not piece:
        return f'<span class="q-tok q-end" data-tip="{tip}">end</span>'
    return f'<span class="{css}" style="--d:{shade}%" data-tip="{tip}">{markup.text(piece)}</span>'


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
    shape = shape_of(answer)
    if shape is not None:
        parts.append(f'<span class="{shape.kind}">{_SIGNS[shape.kind]}{markup.text(shape.told)}</span>')
    return '<div class="q-figures">' + "".join(f"<span>{part}</span>" for part in parts) + "</div>"


def _end(completion: Completion) -> str:
    label = _ENDS[completion.finish_reason]
    if isinstance(completion.stop_reason, str):
        return f"stop text {completion.stop_reason!r}"
    return label


def _prompt(tokens: tuple[TokenView, ...]) -> str:
    """The prompt's probabilities, folded away under its perplexity."""
    if not tokens:
        return ""
    perplexity = math.exp(-math.fsum(token.log_probability for token in tokens) / len(tokens))
    told = f"prompt: perplexity {formats.significant(perplexity)} over {len(tokens):,} tokens"
    spans = "".join(_span(token, token.text) for token in tokens[:MAX_HOVER_TOKENS] if token.text)
    return f'<details class="q-doubt"><summary>{told}</summary><div class="q-answer">{spans}</div></details>'


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
