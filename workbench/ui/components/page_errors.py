"""The boundary of a page: an unexpected error becomes a notice with an id, and a log entry with the traceback."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import streamlit as st

from workbench.access.acting import acting_as
from workbench.ui import markup, pace, who

log = logging.getLogger(__name__)


@contextmanager
def shown() -> Iterator[None]:
    """Catches what escapes from the block, or from the function that it decorates; Streamlit's own signals pass.

    What is done inside is done by who looks at the page (``workbench.access.acting``).
    """
    pace.yield_to_the_engine()
    try:
        with acting_as(who.principal()):
            yield
    except Exception:
        number = secrets.token_hex(4)
        log.exception("a page failed, id %s", number)
        facts = (("what to do", "Reload the page. If it stays, look in the log."), ("id in the log", number))
        st.html(
            markup.panel(
                "bad", "This page could not be shown", "An unexpected error; the engine goes on.", facts
            )
        )
