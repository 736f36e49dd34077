"""What is kept of requests, for how long, and where traces go: a section of the Settings page."""

from __future__ import annotations

import streamlit as st

from workbench.observe.retention import kept
from workbench.settings import Settings
from workbench.ui import formats, markup, resources
from workbench.ui.components import needs
from workbench.ui.markup import Tile
from workbench.ui.resources import PageServices

_TTL_S = 10.0
_TEXTS = {
    "off": "no texts",
    "redacted": "texts with addresses, numbers and keys taken out",
    "full": "texts as they are",
}


def show(services: PageServices) -> None:
    """Read beside the page; nothing is changed here."""
    settings, store = services.settings, services.store
    st.html(markup.section("Records", "what is kept of requests"))
    now = needs.value(
        resources.readings().get(("kept",), lambda: kept(settings.home_dir, store), ttl_s=_TTL_S),
        "The records",
    )
    if now is not None:
        tiles = (
            Tile("Request log", formats.bytes_of(now.request_log_bytes), f"{now.request_log_files:,} files"),
            Tile("Feedback", formats.count(now.feedback)),
            Tile("Job logs", formats.count(now.job_logs)),
        )
        st.html(markup.tiles(tiles))
    st.html("".join(f'<p class="q-muted">{markup.text(told)}</p>' for told in rules(settings)))


def rules(settings: Settings) -> list[str]:
    """What ends the records, what they hold, and who gets traces."""
    days = settings.retention_days
    places = ["the collector of OTEL_EXPORTER_OTLP_ENDPOINT"] if settings.otlp_endpoint else []
    places += ["MLflow (QUIRE_TRACE_SAMPLE)"] if settings.trace_sample else []
    return [
        f"Removed when older than {days:g} days (QUIRE_RETENTION_DAYS), once a day."
        if days is not None
        else "Kept until they are erased: QUIRE_RETENTION_DAYS is not set.",
        f"The request log holds {_TEXTS[settings.request_text]} (QUIRE_REQUEST_TEXT).",
        f"Traces go to {' and '.join(places) or 'nobody'}.",
        "One person's records go with quire erase --user ID, a session's with --session ID.",
    ]
