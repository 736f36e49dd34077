"""Playground: ask one to four versions, with every sampling control, and see each answer's probabilities and figures.

Models that generate nothing have what suits them in the place of a chat: ``workbench.ui.components.text_relations``.

The page never waits for an engine: answers run in ``workbench.ui.answers`` and are only looked at here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import streamlit as st

from workbench.access.principal import Right
from workbench.ui import fleet_view, markup, resources, who
from workbench.ui.answers import follow
from workbench.ui.components import (
    chat_message,
    chat_turn,
    copy_code,
    escape_key,
    sampling_controls,
    side_by_side,
    text_relations,
    top_bar,
    waiting,
)
from workbench.ui.conversations import Conversation, Request, ask, new_conversation, say, stop

if TYPE_CHECKING:
    from workbench.host import PromptChip
    from workbench.resident import Resident
    from workbench.ui.components.chat_turn import Results, Unfinished
    from workbench.ui.components.sampling_controls import Controls

MAX_CHIPS = 8
FOLLOW_S = 0.1
Versions = dict[str, "Resident"]


def show() -> None:
    bar = top_bar.show()
    st.html(markup.title("Playground", "What do these versions answer, how sure are they, how fast?"))
    reader = bar.view.worker
    if reader is not None and reader.pooling.task != "generate" and not bar.view.dead:
        text_relations.show(reader, bar.model_id or "")
        bar.keep_live()
        return
    services = resources.services()
    versions = side_by_side.show({**bar.choices, **fleet_view.choices(services)}, bar.model_id)
    if not waiting.show(bar) and len(versions) < 2:
        if not bar.view.loading:  # an engine that just died is known as failed a moment later
            bar.keep_live()
        return
    worker = bar.view.worker
    with st.sidebar:
        controls = sampling_controls.show(
            (worker and worker.config.max_model_len) or 1_000_000, fleet_view.lacking(versions, services)
        )
    conversation = _conversation()
    _actions(versions, conversation, controls)
    unfinished = _turns(conversation, controls)
    if not conversation.turns:
        _empty(bar, versions, conversation, controls)
    _ask_box(versions, conversation, controls)
    bar.keep_live()
    if unfinished:
        _follow(bar, unfinished)


def _follow(bar: top_bar.Bar, unfinished: list[Unfinished]) -> None:
    """Show the answers as they grow, until one ends. A click or another page ends this run, not the answers."""
    interval_s = FOLLOW_S * len(unfinished)  # several cost no more than one
    for place, _ in enumerate(follow([each.answer for each in unfinished], interval_s)):
        for each in unfinished:
            chat_message.show(each.answer, each.slot, each.expected)
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


def _actions(versions: Versions, conversation: Conversation, controls: Controls) -> None:
    with st.container(horizontal=True, vertical_alignment="center"):
        if st.button("New chat", icon=":material/add:", disabled=not conversation.turns):
            stop(conversation, wait_s=1.0)
            st.session_state.pop("chat", None)
            st.session_state.draft_chat = new_conversation()
            st.query_params.pop("chat", None)
            st.rerun()
        requests = {model: _last_request(conversation, model, controls) for model in versions}
        asked = {
            model: messages
            for model, messages in requests.items()
            if messages and fleet_view.endpoint_of(model, resources.services()) is None
        }
        if controls.params and asked:
            tools = controls.tools or conversation.tools
            copy_code.show(asked, controls.params, tools, needs_key=resources.asks_for_keys())


def _last_request(conversation: Conversation, model: str, controls: Controls) -> list[dict[str, Any]]:
    messages = conversation.messages(model, controls.system)
    return messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages


def _turns(conversation: Conversation, controls: Controls) -> list[Unfinished]:
    """Render what was said; what was shown unfinished."""
    models = {model for turn in conversation.turns for model in turn.replies}
    unfinished: list[Unfinished] = []
    for turn in conversation.turns:
        is_last = turn is conversation.turns[-1]
        shown = chat_turn.show(turn, is_last=is_last, named=len(models) > 1)
        unfinished += shown.unfinished
        if shown.results is not None:
            _send_results(conversation, controls, shown.results)
    return unfinished


def _send_results(conversation: Conversation, controls: Controls, results: Results) -> None:
    request = _request(conversation, controls)
    if request is not None:
        say(fleet_view.find, conversation, results.reply, results.messages, request)
        st.rerun()


def _empty(bar: top_bar.Bar, versions: Versions, conversation: Conversation, controls: Controls) -> None:
    chips = bar.view.card.prompt_chips[:MAX_CHIPS] if bar.view.card else ()
    if not chips:
        st.html('<p class="q-muted">Nothing said yet. Write below; Enter sends.</p>')
        return
    st.html(markup.section("Try a task that it passes", "held out from its training; a click sends it"))
    with st.container(horizontal=True):
        for place, chip in enumerate(chips):
            if st.button(chip.title or chip.family, key=f"chip_{place}", help=chip.family or None):
                _send_chip(versions, conversation, controls, chip)


def _send_chip(versions: Versions, conversation: Conversation, controls: Controls, chip: PromptChip) -> None:
    """The task as it was given: its own system prompt, its tools, its expected answer beside the model's."""
    conversation.tools = chip.tools
    _send(versions, conversation, controls, chip.messages, expected=chip.expected)


def _ask_box(versions: Versions, conversation: Conversation, controls: Controls) -> None:
    with st.bottom:
        if conversation.running:
            escaped = escape_key.show("stop_key")
            label = "Stop all" if len(conversation.running) > 1 else "Stop"
            if st.button(label, shortcut="Esc", type="primary", key="stop_it") or escaped:
                stop(conversation, wait_s=1.0)
                st.rerun()
        hint = (
            "Ask it something; Enter sends" if len(versions) < 2 else f"Ask all {len(versions)}; Enter sends"
        )
        refused = who.lacks(Right.INFER)
        off = controls.params is None or refused is not None
        said = st.chat_input(refused or controls.error or hint, key="said", disabled=off)
    if said:
        stop(conversation, wait_s=1.0)
        _send(versions, conversation, controls, ({"role": "user", "content": str(said)},))


def _request(conversation: Conversation, controls: Controls) -> Request | None:
    if controls.params is None or who.lacks(Right.INFER):
        return None
    return Request(controls.params, controls.system, controls.tools or conversation.tools)


def _send(
    versions: Versions,
    conversation: Conversation,
    controls: Controls,
    messages: tuple[Any, ...],
    **known: Any,
) -> None:
    request = _request(conversation, controls)
    if request is None or not versions:
        return
    ask(fleet_view.find, conversation, versions, messages, request, **known)
    resources.conversations().keep(conversation)
    st.session_state.chat = conversation.id
    st.rerun()


show()
