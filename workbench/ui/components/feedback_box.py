"""What somebody thinks of one answer: thumbs, a score, a comment, a correction, each stored as it is given.

The store's row is the truth: a reload shows what was said. Taking a thumb back is not an opinion and changes nothing.
"""

from __future__ import annotations

import streamlit as st

from workbench.errors import WorkbenchError
from workbench.ui import markup, resources
from workbench.ui.resources import PageServices

_THUMBS = {1: "up", 0: "down"}
KINDS = ("thumbs", "score", "comment", "correction")


def show(request_id: str, text: str) -> None:
    """Render the controls of an answer; nothing in an app without a store."""
    services = resources.services()
    if services is None:
        return
    said = _said(services, request_id)
    with st.container(horizontal=True, vertical_alignment="center", key=f"rate_{request_id}"):
        known = {"up": 1, "down": 0}.get(str(said.get("thumbs")))
        st.feedback(
            "thumbs",
            key=f"thumbs_{request_id}",
            default=known,
            on_change=_thumbed,
            args=(services, request_id),
        )
        more = st.popover("Say more", key=f"more_{request_id}", on_change="rerun")
        if more.open:  # its form costs more than all the rest of an answer
            with more:
                _form(services, request_id, text, said)
        told = ", ".join(kind for kind in KINDS if said.get(kind) is not None)
        if told:
            st.html(f'<span class="q-muted">kept: {markup.text(told)}</span>')


def _thumbed(services: PageServices, request_id: str) -> None:
    """A callback, so that a vote is kept even when the next click leaves the page."""
    thumb = st.session_state.get(f"thumbs_{request_id}")
    if thumb is not None:
        _record(services, request_id, "thumbs", _THUMBS[thumb])


def _form(services: PageServices, request_id: str, text: str, said: dict[str, object]) -> None:
    with st.form(f"feedback_{request_id}", border=False):
        st.markdown("Score, 1 to 5")
        known = said.get("score")
        stars = st.feedback(
            "stars",
            key=f"score_{request_id}",
            default=round(known) - 1 if isinstance(known, float) and known >= 1 else None,
        )
        comment = st.text_area(
            "Comment", str(said.get("comment") or ""), key=f"comment_{request_id}", height=80
        )
        correction = st.text_area(
            "What it should have said", str(said.get("correction") or ""), key=f"correction_{request_id}", height=100,
            placeholder=text[:200], help="A correction can become an example of a data set.",
        )  # fmt: skip
        if st.form_submit_button("Keep", type="primary", key=f"keep_{request_id}"):
            if stars is not None and stars + 1 != known:
                _record(services, request_id, "score", stars + 1)
            for kind, given in (("comment", comment), ("correction", correction)):
                if given and given.strip() and given != said.get(kind):
                    _record(services, request_id, kind, given)
            st.rerun()


def _said(services: PageServices, request_id: str) -> dict[str, object]:
    from workbench.observe import feedback

    try:
        found = feedback.list_feedback(services.store, request_ids=[request_id])
    except WorkbenchError:
        return {}
    texts = {f.kind: f.comment if f.kind == "comment" else f.correction for f in found}
    return {f.kind: f.value if f.value is not None else texts[f.kind] for f in found}


def _record(services: PageServices, request_id: str, kind: str, value: object) -> None:
    from workbench.observe import feedback

    try:
        feedback.record(services.store, request_id, kind, value)
    except WorkbenchError as error:
        st.html(markup.error_panel("The feedback was not kept", error))
