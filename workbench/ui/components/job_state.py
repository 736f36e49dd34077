"""Jobs as pages show them: a chip, progress with the time left, the end with its reason, and cancel.

Reads the job's own row; the row is written by the job's process, so leaving the page changes nothing.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamlit as st

from engine.errors import EngineError
from workbench.errors import WorkbenchError
from workbench.ui import formats, markup, resources, who
from workbench.ui.components import page_errors

if TYPE_CHECKING:
    from workbench.jobs import Job
    from workbench.jobs.model import Device
    from workbench.ui.resources import PageServices

REFRESH_S = 1.0

_REFUSED = "job_refused"  # key of the session's last refusal
LOG_TAIL_BYTES = 24_000
KINDS = {
    "benchmark": "Benchmark",
    "compare": "Comparison",
    "gate": "Gate",
    "finetune": "Fine-tune",
    "notebook": "Notebook",
    "seed_demo": "Setting up the demonstration",
}
_CHIPS = {
    "QUEUED": ("idle", "queued"),
    "RUNNING": ("busy", "running"),
    "DONE": ("ok", "done"),
    "FAILED": ("bad", "failed"),
    "CANCELLED": ("warn", "cancelled"),
    "INTERRUPTED": ("warn", "interrupted"),
}


def name_of(job: Job) -> str:
    return job.title or KINDS.get(job.kind, job.kind)


def chip(job: Job) -> str:
    if not job.ended and job.cancel_requested:
        return markup.chip("busy", "cancelling")
    return state_chip(job.state.name)


def state_chip(name: str) -> str:
    """A state by its name, such as RUNNING."""
    return markup.chip(*_CHIPS[name])


def elapsed_s(job: Job, now: datetime | None = None) -> float | None:
    """Since it started, or from start to end."""
    started = formats.parse_time(job.started_at)
    if started is None:
        return None
    return ((formats.parse_time(job.ended_at) or now or datetime.now(UTC)) - started).total_seconds()


def time_left(job: Job, now: datetime | None = None) -> str:
    """`about 12 s left`, from the fraction done and the time it took; empty until a twentieth is done."""
    spent = elapsed_s(job, now)
    if spent is None or job.fraction < 0.05 or job.fraction >= 1:
        return ""
    return f"about {formats.duration(spent * (1 - job.fraction) / job.fraction + 1)} left"


def progress_text(job: Job) -> str:
    if job.state.name == "QUEUED":
        return "Queued: it starts when the device is free."
    parts = [f"{job.fraction:.0%}", job.message or "Starting", time_left(job)]
    return " · ".join(part for part in parts if part)


def running(job: Job, *, key: str) -> None:
    """Progress and a cancel button, refreshed by themselves; the page reruns when the job has ended."""
    _watch(job.id, key)


@st.fragment(run_every=REFRESH_S)  # type: ignore[untyped-decorator]
@page_errors.shown()
def _watch(job_id: str, key: str) -> None:
    services = resources.services()
    if services is None:
        return
    job = services.jobs.get(job_id)
    if job.ended:
        st.rerun()
    bar, button = st.columns([6, 1], vertical_alignment="bottom")
    with bar:
        st.progress(min(max(job.fraction, 0.0), 1.0), text=f"**{name_of(job)}** · {progress_text(job)}")
    with button:
        if who.button(
            "Cancel", key=f"{key}_cancel", disabled=job.cancel_requested, help="What was done so far is kept."
        ):
            cancel(services, job_id)
            st.rerun(scope="fragment")


def cancel(services: PageServices, job_id: str) -> None:
    """For a button that was pressed. Raises NotAllowedError."""
    who.require()
    services.jobs.cancel(job_id)


def ended(job: Job) -> None:
    """Says why a job has no full result; nothing for one that is done."""
    shown = as_panel(job)
    if shown:
        st.html(shown)


def as_panel(job: Job) -> str:
    name, state = name_of(job), job.state.name
    log = ("log", job.log_path or formats.UNKNOWN)
    if state == "FAILED":
        error = job.error or {}
        facts = [(label, error.get(field)) for label, field in _ERROR_FIELDS]
        shown = [(label, value) for label, value in facts if value not in (None, "")]
        return markup.panel(
            "bad", f"{name} failed", str(error.get("message") or job.message or "no reason was recorded"),
            [*shown, ("job", job.id), log],
        )  # fmt: skip
    if state == "CANCELLED":
        return markup.panel(
            "warn", f"{name} was cancelled", "What was stored until then is kept.", [("job", job.id)]
        )
    if state == "INTERRUPTED":
        told = "The app or the machine stopped under it. What was stored until then is kept; start it again."
        return markup.panel("warn", f"{name} was interrupted", told, [("job", job.id), log])
    return ""


_ERROR_FIELDS = (("value", "value"), ("limit", "limit"), ("what to do", "remedy"), ("id in the log", "code"))


def log_tail(job: Job) -> str:
    """The end of the job's output; empty when there is none yet."""
    if not job.log_path:
        return ""
    try:
        with Path(job.log_path).open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - LOG_TAIL_BYTES))
            tail = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    return tail if size <= LOG_TAIL_BYTES else "… " + tail.partition("\n")[2]


def log_html(job: Job) -> str:
    tail = log_tail(job)
    return f'<pre class="q-log" tabindex="0">{markup.text(tail) or "no output yet"}</pre>'


def start(
    kind: str, spec: dict[str, Any], *, title: str, select: str = "", device: Device = "shared"
) -> None:
    """Submit, for a button's callback. The new job becomes the value of the picker with key `select`; a refused spec is kept
    to be told by `show_refusal`."""
    state, services = st.session_state, resources.services()
    state.pop(_REFUSED, None)
    if services is None:
        return
    try:
        who.require()
        job = services.jobs.submit(kind, spec, title=title, device=device)
    except (WorkbenchError, EngineError) as error:
        state[_REFUSED] = (kind, error)
        return
    if select:
        state[select] = job.id


def show_refusal(kind: str) -> None:
    """Why the last job of this kind was not started; nothing if it was."""
    refused = st.session_state.get(_REFUSED)
    if refused is not None and refused[0] == kind:
        st.html(markup.error_panel("It was not started", refused[1]))


def picker(kind: str, *, key: str, label: str, limit: int = 30) -> Job | None:
    """Choose one of the jobs of a kind, the newest by default, bound to the address; None when there is none."""
    services = resources.services()
    found = services.jobs.list(kind=kind, limit=limit) if services else []
    if not found:
        return None
    by_id = {job.id: job for job in found}
    if st.session_state.get(key) not in by_id:
        st.session_state.pop(key, None)
    chosen = st.selectbox(
        label, list(by_id), format_func=lambda job_id: option(by_id[job_id]), key=key, bind="query-params"
    )
    return by_id.get(chosen or "") or found[0]


def option(job: Job) -> str:
    """A job in one line of text that stays the same and that no other job has, since the address holds it."""
    return f"{name_of(job)} · {formats.at_minute(job.created_at)} · {job.id[-8:]}"
