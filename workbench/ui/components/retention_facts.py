"""What is kept of requests, and for how long: a section of the Settings page."""

from __future__ import annotations

from typing import TYPE_CHECKING

import streamlit as st

if TYPE_CHECKING:
    from workbench.settings import Settings
    from workbench.store import Store


def show(settings: Settings, store: Store) -> None:
    """What is kept now, what ends it, and where traces go. Reads the store; changes nothing."""
    from workbench.errors import WorkbenchError
    from workbench.observe.retention import kept

    days = settings.retention_days
    st.subheader("Records")
    try:
        now = kept(settings.home_dir, store)
    except (WorkbenchError, OSError) as error:
        st.error(f"What is kept cannot be told: {error}")
        return
    columns = st.columns(4)
    columns[0].metric("Request log", f"{now.request_log_bytes / 1e6:.1f} MB")
    columns[1].metric("Files of it", now.request_log_files)
    columns[2].metric("Feedback", now.feedback)
    columns[3].metric("Job logs", now.job_logs)
    st.markdown(
        f"Removed when older than **{days:g} days** (`QUIRE_RETENTION_DAYS`), once a day."
        if days is not None
        else "Kept until they are erased: `QUIRE_RETENTION_DAYS` is not set."
    )
    texts = {"off": "no texts", "redacted": "texts with addresses, numbers and keys taken out", "full": "texts as they are"}  # fmt: skip
    st.markdown(f"The request log holds {texts[settings.request_text]} (`QUIRE_REQUEST_TEXT`).")
    places = ["the collector of `OTEL_EXPORTER_OTLP_ENDPOINT`"] if settings.otlp_endpoint else []
    places += ["MLflow (`QUIRE_TRACE_SAMPLE`)"] if settings.trace_sample else []
    st.markdown(f"Traces go to {' and '.join(places) or 'nobody'}.")
    st.caption("One person's records go with `quire erase --user ID`, a session's with `--session ID`.")
