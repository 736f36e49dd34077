"""API keys: make one, whose text is shown until it is copied, see all, revoke one."""

from __future__ import annotations

import streamlit as st

from workbench.access import keys
from workbench.access.keys import ApiKey, KeyLimits, NewKey
from workbench.access.principal import Right
from workbench.errors import WorkbenchError
from workbench.store import utc_now
from workbench.ui import formats, markup, who
from workbench.ui.components import confirm
from workbench.ui.resources import PageServices

_NEW = "new_key"  # in the session's state
_RIGHTS = {
    Right.INFER: "ask models",
    Right.READ: "see metrics and models",
    Right.ADMIN: "everything",
}
_LIMITS = {
    "requests_per_minute": "Requests a minute",
    "tokens_per_minute": "Tokens a minute",
    "max_concurrent": "Requests at once",
    "daily_tokens": "Tokens a day",
}


def show(services: PageServices) -> None:
    """Render the keys that open something with their buttons, the others below, and the form."""
    st.html(markup.section("API keys", "who may use the API, and how much"))
    _new_key()
    found = keys.listed(services.store)
    now = utc_now()
    valid = [key for key in found if key.is_valid(now)]
    if not found:
        told = "Everybody who reaches this server may use its API. With the first key it asks all of them for one."
        st.html(markup.panel("info", "There are no keys yet", told))
    for key in valid:
        with st.container(border=True, horizontal=True, vertical_alignment="center", key=f"of_{key.id}"):
            st.html(as_html(key), width="stretch")
            told = f"Revoke **{key.name}** ({key.id}). Whoever uses it is let in no more, within a second."
            if confirm.show("Revoke", told, f"Revoke {key.name}", key=f"revoke_{key.id}") is not None:
                who.require()
                keys.revoke(services.store, key.id)
                st.rerun()
    if gone := [key for key in found if not key.is_valid(now)]:
        with st.expander(f"{len(gone)} revoked or expired"):
            st.html("".join(as_html(key) for key in gone))
    _form(services)


def _form(services: PageServices) -> None:
    with (
        st.expander("Make a key", expanded=False, key="key_form_open"),
        st.form("key_form", border=False, enter_to_submit=False),
    ):
        name = st.text_input("Name", key="key_name", placeholder="who or what will use it")
        chosen = st.pills(
            "Rights", list(_RIGHTS), default=[Right.INFER], selection_mode="multi", key="key_rights",
            format_func=lambda right: f"{right.value}: {_RIGHTS[right]}",
        )  # fmt: skip
        columns = st.columns(len(_LIMITS) + 1)
        given = {
            field: column.number_input(label, min_value=1, value=None, key=f"key_{field}", placeholder="no limit")
            for (field, label), column in zip(_LIMITS.items(), columns)
        }  # fmt: skip
        days = columns[-1].number_input(
            "Days that it lives", min_value=1, value=None, key="key_days", placeholder="no end"
        )
        refused = who.lacks()
        if not st.form_submit_button(
            "Make the key", key="key_make", type="primary", help=refused, disabled=refused is not None
        ):
            return
    try:
        who.require()
        made = keys.create(services.store, name, chosen, KeyLimits(**given), expires_days=days)
    except WorkbenchError as error:
        st.html(markup.error_panel("No key was made", error))
        return
    st.session_state[_NEW] = made
    st.rerun()


def _new_key() -> None:
    """The key that was just made, in this session alone, until it is said to be copied: a rerun must not take it away."""
    made: NewKey | None = st.session_state.get(_NEW)
    if made is None:
        return
    told = "Copy the key now: it is stored as a hash, and nobody can show it again."
    st.html(markup.panel("warn", f"{made.key.name} ({made.key.id})", told))
    with st.container(horizontal=True, vertical_alignment="center"):
        st.code(made.text, language=None)
        if st.button("I have it", key="key_copied", width="content"):
            del st.session_state[_NEW]
            st.rerun()


def as_html(key: ApiKey) -> str:
    """A key's facts; nothing of its text but the id."""
    if key.revoked_at is not None:
        state = markup.chip("idle", f"revoked {formats.since(key.revoked_at)}")
    elif key.expires_at is not None and key.expires_at <= utc_now():
        state = markup.chip("idle", f"expired {formats.since(key.expires_at)}")
    else:
        state = markup.chip("ok", " · ".join(key.rights))
    limits = ", ".join(f"{value:,} {_LIMITS[name].lower()}" for name, value in key.limits.as_dict().items())
    used = f"used {formats.since(key.last_used_at)}" if key.last_used_at else "not used yet"
    ends = (
        f"<span>until {markup.text(formats.at_minute(key.expires_at))} UTC</span>" if key.expires_at else ""
    )
    return (
        f'<div><b>{markup.text(key.name)}</b> {state} <span class="q-mono q-muted">{markup.text(key.id)}</span></div>'
        f'<div class="q-figures"><span>{markup.text(limits or "no limits")}</span><span>{markup.text(used)}</span>'
        f"<span>made {markup.text(formats.since(key.created_at))} by {markup.text(key.created_by)}</span>{ends}</div>"
    )
