"""The same thing elsewhere: as a command, as Python, and in a notebook whose parameters are filled in."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import streamlit as st


def show(
    command: str, python: str, notebook: str = "", parameters: Mapping[str, Any] | None = None, *, key: str
) -> None:
    """A popover with each text and its copy button."""
    with st.popover(
        "Do this in code", help="The same as a command, in Python, or in a notebook", key=f"{key}_recipes"
    ):
        titles = ["Command", "Python", *(["Notebook"] if notebook else [])]
        tabs = st.tabs(titles)
        tabs[0].code(command, language="bash", wrap_lines=True)
        tabs[1].code(python, language="python", wrap_lines=True)
        if notebook:
            tabs[2].code(notebook_command(notebook, parameters or {}), language="bash", wrap_lines=True)
            tabs[2].caption(
                f"`quire lab` opens JupyterLab on the same engine and records; the file is `notebooks/{notebook}.ipynb`."
            )


def command(*words: object, **options: object) -> str:
    """A shell line; options with None or False are left out, True is a flag, underscores become dashes."""
    parts = [str(word) if place == 0 else shlex.quote(str(word)) for place, word in enumerate(words)]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            parts.append(flag)
        elif value not in (None, False, ""):
            parts += [flag, shlex.quote(str(value))]
    return " ".join(parts)


def notebook_command(notebook: str, parameters: Mapping[str, Any]) -> str:
    given = [
        f"-p {name}={shlex.quote(str(value))}" for name, value in parameters.items() if value is not None
    ]
    return " ".join([f"quire notebook run {notebook}", *given])


def job_call(kind: str, spec: Mapping[str, Any]) -> str:
    """Python that runs the same job: in the running app of this HOME_DIR, or in the process itself when there is none."""
    lines = "".join(f"    {name!r}: {value!r},\n" for name, value in spec.items() if value is not None)
    return (
        "from workbench import settings\nfrom workbench.jobs import Jobs\nfrom workbench.store import open_store\n\n"
        "home = settings.load().home_dir\njobs = Jobs(open_store(home), home)\n"
        f"job = jobs.run({kind!r}, {{\n{lines}}})\nprint(job.state, job.result)"
    )
