"""Compare: is the candidate better, how sure are we, and where is it not? Promote it, or go back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import streamlit as st

from workbench.ui import fleet_view, markup, pace, registry_view, resources, who
from workbench.ui.components import (
    action_state,
    compare_form,
    compare_report,
    job_state,
    needs,
    page_errors,
    recipes,
    top_bar,
    version_card,
)
from workbench.ui.registry_view import CHAMPION

if TYPE_CHECKING:
    from workbench.ui.components.compare_form import Choice
    from workbench.ui.resources import PageServices

KIND, PICK = "compare", "comparison"
REFRESH_S = 5.0


def show() -> None:
    bar = top_bar.show()
    st.html(markup.title("Compare", "Is the candidate better, how sure are we, and where is it worse?"))
    services = needs.services()
    if services is None:
        return
    action_state.show(version_card.ACTIONS)
    choice = _form(services)
    job_state.show_refusal(KIND)
    job = job_state.picker(KIND, key=PICK, label="Comparison")
    if job is None:
        _empty(choice)
    elif not job.ended:
        job_state.running(job, key="compare")
        compare_report.partial(job)
    else:
        job_state.ended(job)
        if job.result or job.partial:
            compare_report.show(services, job)
    if choice is not None:
        _recipes(choice)
    _keep_chip(bar)


def _form(services: PageServices) -> Choice | None:
    """The form in the sidebar; None while the registry has not answered or there is nothing to compare."""
    known = registry_view.all_versions(services)
    st.session_state.compare_seen = registry_view.signature(known.value or {})
    datasets = registry_view.dataset_names(services)
    if known.value is None or datasets.value is None:
        if known.value is None:
            needs.value(known, "The registry")
        else:
            needs.value(datasets, "The datasets")
        return None
    if not known.value or not datasets.value:
        return None
    champion = next((ref for ref, info in known.value.items() if CHAMPION in info.aliases), None)
    with st.sidebar:
        choice = compare_form.show(
            known.value,
            champion,
            datasets.value,
            registry_view.scorer_names(),
            fleet_view.model_ids(services),
        )
        who.button(
            "Compare", type="primary", key="compare_start", on_click=_start, args=(choice,), width="stretch",
            disabled=choice.a == choice.b, help="Choose two different versions." if choice.a == choice.b else None,
        )  # fmt: skip
    return choice


def _start(choice: Choice) -> None:
    job_state.start(KIND, choice.spec(), title=choice.title, select=PICK, device="exclusive")


def _empty(choice: Choice | None) -> None:
    if choice is None:
        told = "There are no registered versions or no datasets yet; the demonstration is still being set up, or register a model on Versions."
        st.html(markup.panel("info", "Nothing to compare yet", told))
        return
    st.html(
        markup.panel(
            "info", "Nothing has been compared yet",
            f"The first one could be {choice.title}. The sidebar has every setting.",
        )
    )  # fmt: skip
    who.button("Compare them", type="primary", key="compare_first", on_click=_start, args=(choice,))


def _recipes(choice: Choice) -> None:
    options = {"dataset": choice.dataset, "limit": choice.limit, "seed": choice.seed or None, "rules": choice.gate,
               "no_speed": not choice.speed}  # fmt: skip
    recipes.show(
        recipes.command("quire compare", choice.a, choice.b, **options, json=True),
        recipes.job_call(KIND, choice.spec()),
        "compare_versions", {"a": choice.a, "b": choice.b, "dataset": choice.dataset, "limit": choice.limit},
        key="compare",
    )  # fmt: skip


@st.fragment(run_every=pace.every(REFRESH_S))  # type: ignore[untyped-decorator]
@page_errors.shown()
def _keep_chip(bar: top_bar.Bar) -> None:
    """The chip, kept fresh; draws the page again when the registry has changed."""
    bar.refresh()
    services, seen = resources.services(), st.session_state.get("compare_seen")
    found = registry_view.all_versions(services).value if services else None
    if found is not None and seen is not None and seen != registry_view.signature(found):
        st.rerun()


show()
