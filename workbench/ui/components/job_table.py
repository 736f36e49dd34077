"""All jobs, newest first: state, progress, time, and for the chosen one its output, error and result."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import streamlit as st

from workbench.errors import WorkbenchError
from workbench.ui import formats, markup
from workbench.ui.components import job_state

if TYPE_CHECKING:
    from workbench.jobs import Job
    from workbench.ui.resources import PageServices

MAX_ROWS = 25
MAX_RESULT_CHARS = 20_000


def as_html(jobs: list[Job]) -> str:
    """The table, or a sentence when there is none."""
    if not jobs:
        return (
            '<p class="q-muted">No job has run yet: a benchmark, a comparison or a notebook starts one.</p>'
        )
    head = ["job", "kind", "state", "what it does", "started", "took"]
    return markup.html_table(head, map(_row, jobs[:MAX_ROWS]), left=4, css="wrap")


def _row(job: Job) -> list[str]:
    told = job_state.progress_text(job) if not job.ended else job.message
    return [
        f"<b>{markup.text(job_state.name_of(job))}</b>",
        markup.text(job_state.KINDS.get(job.kind, job.kind)),
        job_state.chip(job),
        markup.text(told or formats.UNKNOWN),
        markup.text(formats.since(job.started_at or job.created_at)),
        markup.text(formats.duration(job_state.elapsed_s(job))),
    ]


def detail(services: PageServices, job_id: str, *, key: str) -> Job | None:
    """One job with its progress or end and its output; None when there is no such job."""
    try:
        job = services.jobs.get(job_id)
    except WorkbenchError as error:
        st.html(markup.error_panel("That job is not here", error))
        return None
    if job.ended:
        job_state.ended(job)
    else:
        job_state.running(job, key=key)
    st.html(markup.section("Output", "the end of it" if job.ended else "live") + job_state.log_html(job))
    with st.expander("Spec and result"):
        st.code(
            _json({"spec": job.spec, "result": job.result, "partial": job.partial, "error": job.error}),
            language="json",
        )
    return job


def _json(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, indent=1)
    return text if len(text) <= MAX_RESULT_CHARS else text[:MAX_RESULT_CHARS] + "\n… shortened"
