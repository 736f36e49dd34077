"""The machine's limit on the Engine page: measured on demand, told in figures that add up, honest where there is nothing to tell."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from page_world import html_of
from records_world import settle

from engine.fake_runner import FakeRunner
from engine.limits import Spent
from engine.plan import StepResult
from engine.sampling_params import SamplingParams
from workbench.limits import LimitStore
from workbench.ui.components import limit_bar

SPENT = Spent(
    num_steps=9, idle_s=10.0, busy_s=20.0, device_s=15.0, weights_s=4.0, kv_s=2.0, compute_s=1.0, num_bytes=2e11,
    num_flops=3e12,
)  # fmt: skip


class NeedyRunner(FakeRunner):
    """Its steps need something, as a model's do."""

    def collect(self) -> StepResult:
        return replace(super().collect(), bytes_needed=10**6, weight_bytes=900_000, flops_needed=1000)


def test_parts_of_the_bar_add_up_and_the_share_is_of_the_busy_time():
    shown = limit_bar.told(SPENT)
    parts = dict(re.findall(r'">([\w ]+) <b>([\d.]+) %</b>', shown))
    assert {name: float(value) for name, value in parts.items()} == {
        "weights": 13.3, "KV": 6.7, "compute": 3.3, "kernels above that": 26.7, "host": 16.7, "idle": 33.3,
    }  # fmt: skip
    widths = [float(width) for width in re.findall(r"width:([\d.]+)%", shown)]
    assert sum(widths) == pytest.approx(100, abs=0.05)  # six values of two decimals
    assert "<b>35.0 %</b>" in shown
    assert "max(weight bytes ÷ bandwidth" in shown  # the formula, on hover


@pytest.mark.parametrize(
    ("change", "bound", "helps"),
    [
        ({}, "reading weights", "kernels"),
        ({"weights_s": 9.0}, "reading weights", "all weights"),
        ({"kv_s": 8.0}, "reading keys and values", "shorter contexts"),
        ({"compute_s": 8.0}, "arithmetic", "arithmetic itself"),
        ({"weights_s": 21.0}, "reading weights", "measure again"),
        ({"device_s": 5.0}, "the host", "waits for the host"),
    ],
)
def test_it_names_what_bounds_and_what_would_help(change, bound, helps):
    shown = limit_bar.told(replace(SPENT, **change))
    assert f"bound by {bound}<" in shown
    assert helps in shown


def test_page_measures_when_asked_and_then_tells_what_it_found(records, open_page):
    made = records(runner_type=NeedyRunner)
    at = open_page("engine")
    assert "Not measured yet" in html_of(at)
    assert "of the limit" not in html_of(at)
    at.button("measure_limits").click()
    shown = html_of(settle(at.run()))
    assert "Measure the machine: done" in shown
    assert "No step in this window." in shown
    assert "This machine reads " in shown
    made.host.worker().submit([1, 2, 3], SamplingParams(max_tokens=9, ignore_eos=True)).result(10)
    shown = html_of(at.run())
    assert "of the limit" in shown
    assert "bound by the host" in shown  # a fake device takes no time
    assert "Needed " in shown
    at.session_state["mode"] = "Paused"
    assert "bound by the host" in html_of(at.run())
    assert not at.exception


def test_page_says_why_it_did_not_measure(records, open_page):
    made = records(delay_s=0.02)
    stream = made.host.worker().submit([1, 2, 3], SamplingParams(max_tokens=400, ignore_eos=True))
    at = open_page("engine")
    at.button("measure_limits").click()
    assert "measured while no request runs" in html_of(settle(at.run()))
    stream.abort()
    assert LimitStore(made.settings.home_dir).find(made.host.worker()) is None


def test_engine_without_a_model_has_no_share(records, open_page):
    made = records()
    worker = made.host.worker()
    worker.submit([1, 2, 3], SamplingParams(max_tokens=4, ignore_eos=True)).result(10)
    LimitStore(made.settings.home_dir).measure(worker)
    shown = html_of(open_page("engine"))
    assert f"float32, KV cache {worker.config.kv_cache_dtype}, 512 tokens" in shown  # beside the memory
    assert "this engine has no model" in shown
    assert "of the limit" not in shown
