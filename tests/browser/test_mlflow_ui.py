"""Our runs in MLflow's own pages, under our origin: ticked and compared, charts of shared metrics, the per-example table."""

from __future__ import annotations

import re
import time

import httpx
import pytest
from mlflow_runs import log_two_benchmarks, log_two_evaluations
from playwright.sync_api import Page, expect

from workbench import tracking

pytestmark = pytest.mark.full
READY_MS = 120_000


@pytest.fixture(scope="module")
def site(start_site):
    """A site without a model, with MLflow answering and two runs of each kind."""
    with start_site(QUIRE_FAKE="true") as settings:
        for _ in range(240):
            if tracking.answers(tracking.own_server(settings)):
                break
            httpx.get(settings.url + "/healthz", timeout=10)
            time.sleep(0.5)
        else:
            pytest.fail("MLflow did not answer within two minutes")
        log_two_benchmarks(settings)
        log_two_evaluations(settings)
        yield settings


def runs_page(visit, site, kind: str, mode: str = "") -> Page:
    experiment = tracking.experiment(site, kind)
    return visit(site.url).open(f"/mlflow/#/experiments/{experiment}/runs{mode}")


def test_two_benchmarks_are_ticked_and_compared(site, visit, screenshots):
    page = runs_page(visit, site, "benchmark")
    for name in ("slow", "fast"):
        expect(page.get_by_role("link", name=name, exact=True)).to_be_visible(timeout=READY_MS)
    ticks = page.get_by_role("checkbox", name=re.compile("toggle row selection"))
    expect(ticks).to_have_count(2)
    for place in range(2):
        ticks.nth(place).check(force=True)
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.get_by_text("Comparing 2 Runs from 1 Experiment")).to_be_visible()
    for metric in ("e2e_ms/p95", "generator/lateness_ms_max"):  # the list shows what fits
        expect(page.get_by_role("link", name=metric, exact=True)).to_be_attached()
    page.screenshot(path=screenshots / "mlflow-benchmarks-compared.png")


def test_benchmarks_share_their_charts(site, visit, screenshots):
    page = runs_page(visit, site, "benchmark", "?compareRunsMode=CHART")
    expect(page.get_by_text("e2e_ms/p95").first).to_be_visible(timeout=READY_MS)
    chart = page.locator(".js-plotly-plot").first
    expect(chart).to_be_visible()
    expect(chart.locator(".bars .point")).to_have_count(2)  # one bar a run
    page.screenshot(path=screenshots / "mlflow-benchmarks-charts.png")


def test_two_evaluations_are_ticked_and_compared(site, visit, screenshots):
    page = runs_page(visit, site, "evaluation")
    expect(page.get_by_role("link", name="extractor/2 on messages")).to_be_visible(timeout=READY_MS)
    ticks = page.get_by_role("checkbox", name=re.compile("toggle row selection"))
    expect(ticks).to_have_count(2)
    for place in range(2):
        ticks.nth(place).check(force=True)
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.get_by_text("Comparing 2 Runs from 1 Experiment")).to_be_visible()
    expect(page.get_by_role("link", name="exact_match")).to_be_attached()
    for value in ("0.5", "0.75"):
        expect(page.locator("[role=grid]").get_by_text(value, exact=True)).to_be_attached()
    page.screenshot(path=screenshots / "mlflow-evaluations-compared.png")


def test_evaluations_lie_side_by_side_example_by_example(site, visit, screenshots):
    page = runs_page(visit, site, "evaluation", "?compareRunsMode=ARTIFACT")
    expect(page.get_by_text("examples.json", exact=True)).to_be_visible(timeout=READY_MS)
    for said in ("t-0", "answer 0", "extractor/1 on messages", "extractor/2 on messages"):
        expect(page.get_by_text(said, exact=True).first).to_be_visible()
    page.screenshot(path=screenshots / "mlflow-evaluations-table.png")


def test_links_of_our_pages_lead_there(site, visit):
    page = visit(site.url).open("/benchmark")
    link = page.get_by_role("link", name="This run in MLflow")
    expect(link).to_be_visible(timeout=READY_MS)
    assert re.match(r"^(http://[^/]+)?/mlflow/#/experiments/\d+/runs/\w+$", link.get_attribute("href") or "")
