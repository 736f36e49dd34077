"""Playground: chat with a version, with every sampling control, and see each answer's probabilities and figures.

The page never waits for the engine: an answer runs in ``workbench.ui.conversations`` and is only looked at here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import streamlit as st

from engine.errors import EngineError
from workbench.ui import markup, resources
from workbench.ui.components import (
    chat_message,
    copy_code,
    escape_key,
    feedback_box,
    sampling_controls,
    top_bar,
    waiting,
)
from workbench.ui.conversations import Answer, Conversation, Turn, ask, new_conversation

if TYPE_CHECKING:
    from streamlit.delta_generator import DeltaGenerator

    from engine.worker import EngineWorker
    from workbench.host import PromptChip
    from workbench.ui.components.sampling_controls import Controls

MAX_CHIPS = 8
FOLLOW_S = 0.1
_AVATARS = {"user": ":material/person:", "assistant": ":material/smart_toy:", "system": ":material/settings:",
            "tool": ":material/build:"}  # fmt: skip


def show() -> None:
    bar = top_bar.show()
    st.html(markup.title("Playground", "What does this version answer, how sure is it, how fast?"))
    if not waiting.show(bar) or bar.view.worker is None:
        return
    worker = bar.view.worker
    with st.sidebar:
        controls = sampling_controls.show(worker.config.max_model_len or 1_000_000)
    conversation = _conversation()
    _actions(bar, conversation, controls)
    unfinished = _turns(conversation)
    if not conversation.turns:
        _empty(bar, worker, conversation, controls)
    _ask_box(worker, conversation, controls)
    bar.keep_live()
    if unfinished is not None:
        _follow(bar, *unfinished)


def _follow(bar: top_bar.Bar, answer: Answer, slot: DeltaGenerator) -> None:
    """Show the answer as it grows. A click or another page ends this run, not the answer."""
    for place, _ in enumerate(answer.follow(FOLLOW_S)):
        chat_message.show(answer, slot)
        if place % 10 == 9:
            bar.refresh()
    st.rerun()


def _conversation() -> Conversation:
    """The one that the address names, or this session's last one; a new one when the app knows neither."""
    store, state = resources.conversations(), st.session_state
    found = store.get(st.query_params.get("chat")) or store.get(state.get("chat"))
    if found is None:
        return state.setdefault("draft_chat", new_conversation())  # type: ignore[no-any-return]
    state.chat = st.query_params["chat"] = found.id
    return found


def _actions(bar: top_bar.Bar, conversation: Conversation, controls: Controls) -> None:
    with st.container(horizontal=True, vertical_alignment="center"):
        if st.button("New chat", icon=":material/add:", disabled=not conversation.turns):
            if conversation.running:
                conversation.running.stop()
            st.session_state.pop("chat", None)
            st.session_state.draft_chat = new_conversation()
            st.query_params.pop("chat", None)
            st.rerun()
        messages = conversation.messages(controls.system)
        if messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if controls.params and messages and bar.model_id:
            copy_code.show(bar.model_id, messages, controls.params, conversation.tools)


def _turns(conversation: Conversation) -> tuple[Answer, DeltaGenerator] | None:
    """Render what was said; the answer that was shown unfinished, and its slot.

    It may end at any moment: whether it has to be followed is decided by what was shown, not by how it is by then.
    """
    unfinished: tuple[Answer, DeltaGenerator] | None = None
    for turn in conversation.turns:
        for message in turn.messages:
            with st.chat_message(str(message["role"]), avatar=_AVATARS.get(str(message["role"]))):
                st.html(f'<div class="q-answer">{markup.text(message.get("content") or "")}</div>')
        with st.chat_message("assistant", avatar=_AVATARS["assistant"]):
            if turn.answer is None:
                st.html(markup.panel("bad", "The request was refused", turn.error or ""))
                continue
            slot = st.empty()
            if not chat_message.show(turn.answer, slot, turn.expected):
                unfinished = turn.answer, slot
            elif turn.answer.text:
                feedback_box.show(turn.answer.request_id, turn.answer.text)
    return unfinished


def _empty(bar: top_bar.Bar, worker: EngineWorker, conversation: Conversation, controls: Controls) -> None:
    chips = bar.view.card.prompt_chips[:MAX_CHIPS] if bar.view.card else ()
    if not chips:
        st.html('<p class="q-muted">Nothing said yet. Write below; Enter sends.</p>')
        return
    st.html(markup.section("Try a task that it passes", "held out from its training; a click sends it"))
    with st.container(horizontal=True):
        for place, chip in enumerate(chips):
            if st.button(chip.title or chip.family, key=f"chip_{place}", help=chip.family or None):
                _send_chip(worker, conversation, controls, chip)


def _send_chip(
    worker: EngineWorker, conversation: Conversation, controls: Controls, chip: PromptChip
) -> None:
    """The task as it was given: its own system prompt, its tools, its expected answer beside the model's."""
    conversation.tools = chip.tools
    _send(worker, conversation, controls, chip.messages, expected=chip.expected)


def _ask_box(worker: EngineWorker, conversation: Conversation, controls: Controls) -> None:
    running = conversation.running
    with st.bottom:
        if running is not None:
            escaped = escape_key.show("stop_key")
            if st.button("Stop", shortcut="Esc", type="primary", key="stop_it") or escaped:
                running.stop()
                st.rerun()
        said = st.chat_input("Ask it something; Enter sends", key="said", disabled=controls.params is None)
    if said:
        if running is not None:
            running.stop()
        _send(worker, conversation, controls, ({"role": "user", "content": str(said)},))


def _send(
    worker: EngineWorker,
    conversation: Conversation,
    controls: Controls,
    messages: tuple[Any, ...],
    **known: Any,
) -> None:
    if controls.params is None:
        return
    try:
        ask(worker, conversation, messages, controls.params, system=controls.system, **known)
    except EngineError as error:
        conversation.turns.append(Turn(messages, error=str(error)))
    resources.conversations().keep(conversation)
    st.session_state.chat = conversation.id
    st.rerun()


show()
