"""Benchmark: describe a workload and an SLO, run it, read the distributions, compare with an earlier run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import streamlit as st

from workbench.backends.endpoints import is_endpoint
from workbench.ui import benchmark_result, fleet_view, markup, pace, resources, who
from workbench.ui.components import (
    bench_report,
    job_state,
    needs,
    page_errors,
    recipes,
    top_bar,
    waiting,
    workload_form,
)

if TYPE_CHECKING:
    from workbench.bench.saved import BenchmarkRecord
    from workbench.ui.components.workload_form import Workload
    from workbench.ui.resources import PageServices

KIND, PICK, AGAINST, STARTED = "benchmark", "bench", "against", "bench_started"
TARGET = "target"
REFRESH_S = 5.0


def show() -> None:
    bar = top_bar.show()
    st.html(markup.title("Benchmark", "How fast is this version under this load, and what limits it?"))
    services = needs.services()
    if services is None or not waiting.show(bar) or bar.view.worker is None:
        return
    with st.sidebar:
        model = _target(bar.model_id or "")
        workload = _form(model, bar.view.worker.config.max_model_len or 1_000_000)
    job_state.show_refusal(KIND)
    is_running = _newest_job(services)
    found = needs.value(benchmark_result.listed(services), "The benchmarks")
    if found:
        _result(services, found, workload)
    elif found is not None and not is_running:
        _empty(model)
    _recipes(workload, model)
    _keep_chip(bar)


def _newest_job(services: PageServices) -> bool:
    """The newest benchmark job while it runs, or why it has no full result; whether it runs."""
    newest = services.jobs.list(kind=KIND, limit=1)
    if not newest:
        return False
    job = newest[0]
    if not job.ended:
        job_state.running(job, key="bench")
        bench_report.partial(job)
        return True
    job_state.ended(job)
    if st.session_state.get(STARTED) == job.id:  # this session's own run has just ended: show it
        del st.session_state[STARTED]
        resources.readings().forget(benchmark_result.BENCHMARKS)
        if job.result:
            st.session_state[PICK] = job.result["id"]
    return False


def _target(model: str) -> str:
    """Whom to load: the version that the bar names, or a model of an endpoint."""
    options = [model, *fleet_view.model_ids(resources.services())]
    if len(options) == 1:
        return model
    if st.session_state.get(TARGET) not in options:
        st.session_state.pop(TARGET, None)
    chosen = st.selectbox(
        "Whom to load", options, key=TARGET, bind="query-params",
        help="An endpoint is measured from here: latencies hold the way to it, and nothing is known of its engine.",
    )  # fmt: skip
    return str(chosen)


def _form(model: str, context: int) -> Workload:
    who.button(
        f"Run the {workload_form.PRESET_S}-second preset", on_click=_start, args=(workload_form.preset(), model), key="preset",
        icon=":material/timer:", width="stretch", help=f"{workload_form.preset().title}; the form stays as it is.",
    )  # fmt: skip
    workload = workload_form.show(context)
    who.button(
        "Run the benchmark",
        type="primary",
        key="bench_start",
        on_click=_start,
        args=(workload, model),
        width="stretch",
    )
    return workload


def _start(workload: Workload, model: str) -> None:
    job_state.start(
        KIND,
        workload.spec(model),
        title=f"Benchmark of {model}: {workload.title}",
        select=STARTED,
        device="none" if is_endpoint(model) else "exclusive",
    )


def _empty(model: str) -> None:
    preset = workload_form.preset()
    st.html(
        markup.panel(
            "info", "No benchmark has run yet",
            f"The preset takes {workload_form.PRESET_S} seconds: {preset.title}. The sidebar has every setting.",
        )
    )  # fmt: skip
    who.button(
        f"Run the {workload_form.PRESET_S}-second benchmark",
        type="primary",
        key="bench_first",
        on_click=_start,
        args=(workload_form.preset(), model),
    )


def _result(services: PageServices, found: list[BenchmarkRecord], workload: Workload) -> None:
    by_id = {record.id: record for record in found}
    if st.session_state.get(PICK) not in by_id:
        st.session_state.pop(PICK, None)
    left, right = st.columns(2, gap="medium")
    with left:
        chosen = st.selectbox(
            "Run",
            list(by_id),
            key=PICK,
            bind="query-params",
            format_func=lambda i: benchmark_result.option(by_id[i]),
        )
    with right:
        others = [i for i in by_id if i != chosen]
        if st.session_state.get(AGAINST) not in others:
            st.session_state.pop(AGAINST, None)
        against = st.selectbox(
            "Beside an earlier run", others, index=None, key=AGAINST, bind="query-params", placeholder="none",
            format_func=lambda i: benchmark_result.option(by_id[i]), disabled=not others,
        )  # fmt: skip
    saved = needs.value(benchmark_result.load(services, chosen), "The requests")
    if saved is None:
        return
    earlier = benchmark_result.load(services, against).value if against else None
    bench_report.show(services, saved, workload.slo, earlier)


def _recipes(workload: Workload, model: str) -> None:
    load = {"concurrency": workload.concurrency, "rate": workload.rate}
    options = {**load, "requests": workload.requests, "input_tokens": workload.input_tokens,
               "output_tokens": workload.output_tokens, "seed": workload.seed}  # fmt: skip
    given = {name: value for name, value in options.items() if value is not None}
    recipes.show(
        recipes.command("quire bench run", model=model, **options, json=True),
        recipes.job_call(KIND, workload.spec(model)),
        "benchmark", {"model": model, **given}, key="bench",
    )  # fmt: skip


@st.fragment(run_every=pace.every(REFRESH_S))  # type: ignore[untyped-decorator]
@page_errors.shown()
def _keep_chip(bar: top_bar.Bar) -> None:
    if bar.refresh().worker is None:
        st.rerun()


show()
