"""One turn of a conversation: the question over all columns, then each version's answers in its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import streamlit as st

from engine.best_of import choose_best
from engine.sampling_params import SamplingParams
from workbench.ui import markup
from workbench.ui.components import chat_message, feedback_box
from workbench.ui.output_shape import shape_of

if TYPE_CHECKING:
    from streamlit.delta_generator import DeltaGenerator

    from workbench.chat_request import Message
    from workbench.resident import Resident
    from workbench.ui.answers import Answer
    from workbench.ui.conversations import Reply, Turn

_AVATARS = {"user": ":material/person:", "assistant": ":material/smart_toy:", "system": ":material/settings:",
            "tool": ":material/build:"}  # fmt: skip

_BEST = SamplingParams(logprobs=0)


@dataclass(frozen=True, slots=True)
class Unfinished:
    """An answer that was shown while it ran, and where."""

    answer: Answer
    slot: DeltaGenerator
    expected: str | None


@dataclass(frozen=True, slots=True)
class Results:
    """What the tools gave that one version called."""

    reply: Reply
    messages: tuple[Message, ...]


@dataclass(slots=True)
class Shown:
    """What is to be followed, and what somebody said to one version alone."""

    unfinished: list[Unfinished] = field(default_factory=list)
    results: Results | None = None


def show(turn: Turn, *, is_last: bool, named: bool) -> Shown:
    """Render a turn; `named` says whose answer each is. The last turn's answers can be stopped, and their calls answered.

    An answer may end at any moment: whether it has to be followed is decided by what was shown, not by how it is by then.
    """
    shown = Shown()
    for message in turn.messages:
        _message(message)
    replies = list(turn.replies.values())
    if len(replies) == 1:
        with st.chat_message("assistant", avatar=_AVATARS["assistant"]):
            _reply(replies[0], turn, shown, is_last=is_last, named=named, alone=True)
        return shown
    with st.container(key=f"sides_{replies[0].exchanges[0].answer.request_id}"):
        for reply, column in zip(replies, st.columns(len(replies), border=True), strict=True):
            with column:
                _reply(reply, turn, shown, is_last=is_last, named=True, alone=False)
    return shown


def version_heading(model: str, version: Resident) -> str:
    """The version in its colour; a folder by its title."""
    card = version.card
    name = version.name or (card.title if card else model)
    aliases = [alias.partition("@")[2] for alias in version.aliases]
    options = markup.chip("idle", version.options.label) if version.name and version.options.label else ""
    return markup.version_name(name, version.version, version.digest, aliases) + options


def _message(message: Mapping[str, Any]) -> None:
    with st.chat_message(str(message["role"]), avatar=_AVATARS.get(str(message["role"]))):
        st.html(f'<div class="q-answer">{markup.text(message.get("content") or "")}</div>')


def _reply(reply: Reply, turn: Turn, shown: Shown, *, is_last: bool, named: bool, alone: bool) -> None:
    if named:
        st.html(version_heading(reply.model, reply.version))
    for place, exchange in enumerate(reply.exchanges):
        if place:
            for message in exchange.said:
                _message(message)
        headings = _headings(exchange.answers)
        for answer, heading in zip(exchange.answers, headings, strict=True):
            if heading:
                st.html(f'<p class="q-age">{markup.text(heading)}</p>')
            is_alone = alone and not exchange.others
            _answer(answer, None if place else turn.expected, shown, alone=is_alone)
    if is_last and not reply.last.running and reply.last.output.calls:
        messages = _results_form(reply.last)
        if messages:
            shown.results = Results(reply, messages)


def _answer(answer: Answer, expected: str | None, shown: Shown, *, alone: bool) -> None:
    slot = st.empty()
    if not chat_message.show(answer, slot, expected):
        shown.unfinished.append(Unfinished(answer, slot, expected))
        if not alone and st.button("Stop", key=f"stop_{answer.request_id}", icon=":material/stop:"):
            answer.stop()
            st.rerun()
    elif answer.text:
        _tree(answer)
        feedback_box.show(answer.request_id, answer.text)


def _headings(answers: Sequence[Answer]) -> list[str]:
    """Of one of several: its number, and which of them best_of would choose, once all have ended."""
    if len(answers) < 2:
        return [""] * len(answers)
    done = [answer.completion for answer in answers if answer.completion is not None]
    best = choose_best(done, _BEST.with_(best_of=len(answers)))[0] if len(done) == len(answers) else None
    return [
        f"Answer {number} of {len(answers)}"
        + (", the likeliest: what best_of returns" if answer.completion is best is not None else "")
        for number, answer in enumerate(answers, 1)
    ]


def _tree(answer: Answer) -> None:
    shape = shape_of(answer)
    if shape is not None and shape.tree is not None:
        st.json(shape.tree, expanded=2)


def _results_form(answer: Answer) -> tuple[Message, ...]:
    """A field for each call's result; the messages that answer the calls once they are sent."""
    with st.form(f"results_{answer.request_id}"):
        texts = [
            st.text_area(f"Result of {call.name}", key=f"result_{call.id}", height=80, placeholder="empty")
            for call in answer.output.calls
        ]
        if not st.form_submit_button("Send results", icon=":material/build:"):
            return ()
    return tuple(
        {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": text or ""}
        for call, text in zip(answer.output.calls, texts, strict=True)
    )
