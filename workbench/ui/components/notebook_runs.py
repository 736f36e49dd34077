"""Notebooks: what they are for, the form of their parameters, run or schedule, and what became of earlier runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import streamlit as st

from workbench.ui import formats, markup, resources, who
from workbench.ui.components import job_state, job_table, needs, parameter_form, recipes, schedule_form
from workbench.ui.resources import PageServices

if TYPE_CHECKING:
    from workbench.jobs import Job
    from workbench.runs.notebooks import Notebook

KIND = "notebook"
MAX_HISTORY = 20


def show(services: PageServices) -> None:
    """Render the chosen notebook's form, its progress, and its history."""
    from workbench.runs import notebooks

    found = needs.value(
        resources.readings().get(("notebooks",), lambda: notebooks.discover(services.settings), ttl_s=5.0),
        "The notebooks",
    )
    if found is None:
        return
    by_name = {each.name: each for each in found}
    if not by_name:
        own = services.settings.home_dir / "notebooks"
        st.html(markup.panel("info", "There are no notebooks here", f"Your own ones go to {own}."))
        return
    name = st.selectbox(
        "Notebook",
        list(by_name),
        key="notebook",
        bind="query-params",
        format_func=lambda n: _title(by_name[n]),
    )
    notebook = by_name[name]
    if notebook.error is not None:
        st.html(markup.error_panel(f"{name} cannot be run", notebook.error))
        return
    _form(services, notebook)
    _history(services, name)


def _title(notebook: Notebook) -> str:
    return notebook.title if notebook.bundled else f"{notebook.title} (yours)"


def _form(services: PageServices, notebook: Notebook) -> None:
    if notebook.description:
        st.html(f'<p class="q-muted">{markup.text(notebook.description)}</p>')
    values, wrong = parameter_form.show(notebook)
    for told in wrong:
        st.error(told, icon="⚠️")
    job_state.show_refusal(KIND)
    with st.container(horizontal=True):
        who.button(
            "Run",
            type="primary",
            key="notebook_run",
            on_click=_run,
            args=(notebook.name, values),
            disabled=bool(wrong),
        )
        schedule_form.show(services, notebook.name, values, disabled=bool(wrong))
        changed = {p.name: values[p.name] for p in notebook.parameters if values[p.name] != p.default}
        recipes.show(
            recipes.notebook_command(notebook.name, changed),
            recipes.job_call(KIND, spec_of(notebook.name, values)), key="notebook",
        )  # fmt: skip


def spec_of(name: str, values: dict[str, Any]) -> dict[str, Any]:
    return {"notebook": name, "parameters": values}


def _run(name: str, values: dict[str, Any]) -> None:
    job_state.start(KIND, spec_of(name, values), title=name, select="notebook_job")


def _history(services: PageServices, name: str) -> None:
    runs = [job for job in services.jobs.list(kind=KIND, limit=200) if job.spec.get("notebook") == name][
        :MAX_HISTORY
    ]
    st.html(markup.section("Runs of this notebook", "newest first") + job_table.as_html(runs))
    if not runs:
        return
    options = {job.id: job_state.option(job) for job in runs}
    if st.session_state.get("notebook_job") not in options:
        st.session_state.pop("notebook_job", None)
    chosen = st.selectbox(
        "Look into",
        list(options),
        format_func=lambda job_id: options[job_id],
        key="notebook_job",
        bind="query-params",
    )
    job = job_table.detail(services, chosen or runs[0].id, key="notebook_job_watch")
    if job is not None and job.ended:
        _executed(job)


def _executed(job: Job) -> None:
    """The executed notebook: what each cell said, and the file."""
    from workbench.ui import executed_notebook

    path = executed_notebook.path_of(job)
    if path is None:
        return
    reading = resources.readings().get(
        ("executed", job.id), lambda: executed_notebook.read(path), ttl_s=3600.0
    )
    cells = needs.value(reading, "The executed notebook")
    if cells is None:
        return
    st.html(
        markup.section("Executed notebook", f"{len(cells):,} cells, {formats.at_minute(job.ended_at)} UTC")
    )
    with st.container(horizontal=True):
        st.download_button(
            "Download it",
            data=lambda: path.read_bytes(),
            file_name=path.name,
            mime="application/x-ipynb+json",
            on_click="ignore",
        )
    st.html(executed_notebook.as_html(cells))
