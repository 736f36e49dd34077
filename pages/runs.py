"""Runs: notebooks with their parameters, what runs by itself and when, and every job."""

from __future__ import annotations

import streamlit as st

from workbench.ui import markup, pace, who
from workbench.ui.components import (
    job_state,
    job_table,
    needs,
    notebook_runs,
    page_errors,
    schedule_table,
    top_bar,
)

NOTEBOOKS, SCHEDULES, JOBS = "Notebooks", "Schedules", "Jobs"
REFRESH_S = 2.0


def show() -> None:
    bar = top_bar.show()
    st.html(markup.title("Runs", "What ran, what runs, what runs next, and what went wrong?"))
    _keep_chip(bar)
    services = needs.services()
    if services is None:
        return
    view = st.segmented_control(
        "Show", [NOTEBOOKS, SCHEDULES, JOBS], default=NOTEBOOKS, key="view", bind="query-params", required=True,
        label_visibility="collapsed",
    )  # fmt: skip
    if view == NOTEBOOKS:
        notebook_runs.show(services)
    elif view == SCHEDULES:
        schedule_table.show(services)
    else:
        _jobs()


def _jobs() -> None:
    _list()
    services = needs.services()
    found = services.jobs.list(limit=job_table.MAX_ROWS) if services else []
    if services is None or not found:
        return
    titles = {job.id: job_state.option(job) for job in found}
    if st.session_state.get("job") not in titles:
        st.session_state.pop("job", None)
    chosen = st.selectbox(
        "Look into one", list(titles), index=None, format_func=lambda job_id: titles[job_id], key="job",
        bind="query-params", placeholder="choose a job",
    )  # fmt: skip
    if chosen:
        job_table.detail(services, chosen, key="runs_job")


@st.fragment(run_every=pace.every(REFRESH_S))  # type: ignore[untyped-decorator]
@page_errors.shown()
def _list() -> None:
    services = needs.services()
    if services is None:
        return
    jobs = services.jobs.list(limit=job_table.MAX_ROWS)
    st.html(job_table.as_html(jobs))
    active = [job for job in jobs if not job.ended]
    if active:
        with st.container(horizontal=True):
            for job in active:
                if who.button(
                    f"Cancel {job_state.name_of(job)}", key=f"cancel_{job.id}", disabled=job.cancel_requested
                ):
                    job_state.cancel(services, job.id)
                    st.rerun(scope="fragment")


@st.fragment(run_every=pace.every(REFRESH_S))  # type: ignore[untyped-decorator]
@page_errors.shown()
def _keep_chip(bar: top_bar.Bar) -> None:
    bar.refresh()


show()
