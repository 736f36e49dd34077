"""Running jobs in the top bar: how many, how far, and a cancel button for each.

The line is a live part of the bar; the popover with the buttons comes with a run of the page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import streamlit as st

from workbench.errors import WorkbenchError
from workbench.ui import markup, resources, who
from workbench.ui.components import job_state

if TYPE_CHECKING:
    from workbench.jobs import Job

MAX_SHOWN = 10


def active(max_age_s: float = 0.0) -> list[Job]:
    """Queued and running jobs, oldest first, as read within `max_age_s`; none where there is no store or it cannot be read."""
    from workbench.jobs import JobState

    services = resources.services()
    if services is None:
        return []
    jobs, states = services.jobs, (JobState.QUEUED, JobState.RUNNING)

    def read() -> list[Job]:
        try:
            found = jobs.list(states=states, limit=MAX_SHOWN)
        except WorkbenchError:
            return []
        return sorted(found, key=lambda job: job.created_at)

    return resources.readings().read("active jobs", read, max_age_s)


def line(jobs: list[Job]) -> str:
    """One line of HTML, empty without jobs."""
    if not jobs:
        return ""
    first = next((job for job in jobs if job.state.name == "RUNNING"), jobs[0])
    state = f"{first.fraction:.0%}" if first.state.name == "RUNNING" else "queued"
    told = f"{job_state.name_of(first)} {state}"
    more = f" and {len(jobs) - 1} more" if len(jobs) > 1 else ""
    left = job_state.time_left(first)
    return (
        f'<span class="q-jobline">{markup.text(told + more)}'
        f'<small>{markup.text(left)}</small><span class="q-meter"><i style="width:{100 * first.fraction:.0f}%"></i></span></span>'
    )


def popover(jobs: list[Job]) -> None:
    """The jobs with their buttons; nothing without jobs."""
    services = resources.services()
    if not jobs or services is None:
        return
    with st.popover(f"Jobs: {len(jobs)}", width="stretch", key="bar_jobs"):
        for job in jobs:
            st.html(
                f"<div><b>{markup.text(job_state.name_of(job))}</b> {job_state.chip(job)}"
                f'<br><span class="q-muted">{markup.text(job_state.progress_text(job))}</span></div>'
            )
            if who.button("Cancel", key=f"bar_cancel_{job.id}", disabled=job.cancel_requested):
                job_state.cancel(services, job.id)
                st.rerun()
