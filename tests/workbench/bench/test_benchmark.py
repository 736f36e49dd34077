"""A whole benchmark against a real app process: its figures, what is kept of it, and that client and engine agree."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bench_world import ROOT, clean_environment, settings_of

from workbench.backends.app import AppBackend
from workbench.bench import saved
from workbench.bench.compare import compare_benchmarks
from workbench.bench.errors import BenchmarkError, BenchmarkNotFoundError, BenchmarkNotSavedError
from workbench.bench.report import figures
from workbench.bench.run import Benchmark, Progress, run_benchmark
from workbench.bench.spec import parse
from workbench.cli import main
from workbench.errors import ServerUnreachableError, UnknownModelError
from workbench.jobs import Jobs, JobState
from workbench.ports import free_port
from workbench.run_state import RunState
from workbench.settings import Settings
from workbench.store import open_store

AGREE_MS = 3.0
# p99 of a timer's lateness on a machine that has a core to spare; 1 ms is the timer's own.
QUIET_LAG_MS = 1.15
ATTEMPTS = 6


def run(settings: Settings, **spec: object) -> Benchmark:
    return run_benchmark(parse(spec), settings, track=False)


def test_figures_and_records_of_a_closed_loop(app):
    told: list[Progress] = []
    spec = parse(
        {
            "requests": 12,
            "concurrency": 3,
            "input_tokens": 60,
            "output_tokens": 10,
            "slo": {"ttft_ms": 60_000},
        }
    )
    done = run_benchmark(spec, app, track=False, on_progress=told.append)
    found, record = done.record.figures, done.record
    assert (found["num_requests"], found["num_ok"], found["errors"]) == (12, 12, {})
    assert found["output_tokens"] == {"mean": 10, "min": 10, "max": 10}
    assert 57 <= found["input_tokens"]["min"] <= found["input_tokens"]["max"] <= 60
    assert found["goodput"]["share"] == 1
    assert found["output_tokens_per_s"] == pytest.approx(120 / found["duration_s"])
    assert record.engine["num_missing"] == 0
    assert record.engine["num_steps"] >= 40  # four rounds of ten tokens
    assert record.agreement["num_requests"] == 12
    assert record.target["model"] == "fake-echo"
    assert record.commit["revision"] or record.versions["python"]
    assert told[-1].fraction == 1
    assert [p.fraction for p in told] == sorted(p.fraction for p in told)


def test_what_is_saved_gives_the_same_figures(app):
    done = run(app, requests=6, concurrency=2, input_tokens=40, output_tokens=5, name="mine")
    record, table = saved.load(app.home_dir, done.record.id)
    assert record == done.record
    assert figures(table, slo={}, loop_lag_ms=record.loop_lag_ms) == done.record.figures
    assert saved.load(app.home_dir, "latest")[0].id == done.record.id
    assert saved.listed(app.home_dir)[0].title == "mine"
    with pytest.raises(BenchmarkNotFoundError):
        saved.load(app.home_dir, "bench-none")
    with pytest.raises(BenchmarkNotFoundError):
        saved.load(app.home_dir, "")


@pytest.mark.full
@pytest.mark.alone
def test_client_and_engine_agree_per_request(app):
    """TTFT, TPOT and E2E of the same requests, the client's against the engine's RequestRecords: within 3 ms at p95.

    Only a run on a quiet machine can show that: a timer of the client's loop says how late this machine lets processes run.
    Noise or not, a figure taken at the wrong place would move the median of every run.
    """
    seen = []
    for _ in range(ATTEMPTS):
        record = run(app, requests=30, concurrency=2, input_tokens=64, output_tokens=8).record
        agreement, lag = record.agreement, record.figures["generator"]["loop_lag_ms"]["p99"]
        assert agreement["num_requests"] == 30
        seen.append(
            [agreement[name][q] for q in ("p50", "p95") for name in ("ttft_ms", "tpot_ms", "e2e_ms")] + [lag]
        )
        if max(seen[-1][3:6]) <= AGREE_MS:
            return
    told = [[round(value, 2) for value in each] for each in seen]
    assert min(max(each[:3]) for each in seen) <= 2 * AGREE_MS, f"medians apart in every run: {told}"
    assert not any(each[6] <= QUIET_LAG_MS for each in seen), f"apart on a quiet machine: {told}"
    pytest.skip(
        f"this machine is too busy to tell: timers were late in every run (p50 × 3, p95 × 3, lag p99, ms): {told}"
    )


def test_an_open_loop_sends_by_its_schedule(app):
    done = run(app, requests=20, rate=40.0, input_tokens=30, output_tokens=4, seed=5)
    table = done.requests
    assert done.record.offered_rps == pytest.approx(19 / (table["planned_ms"].max() / 1e3))
    assert (table["lateness_ms"] >= 0).all()
    assert done.record.figures["generator"]["lateness_ms"]["p50"] < 10
    again = run(app, requests=20, rate=40.0, input_tokens=30, output_tokens=4, seed=5)
    assert again.record.plan_digest == done.record.plan_digest
    assert again.requests["planned_ms"].tolist() == table["planned_ms"].tolist()


def test_dataset_and_trace(app, tmp_path):
    dataset = tmp_path / "d.jsonl"
    dataset.write_text('{"prompt": "hello"}\n{"messages": [{"role": "user", "content": "bye"}]}\n')
    assert run(app, dataset=str(dataset), requests=4, output_tokens=3).record.figures["num_ok"] == 4
    trace = tmp_path / "t.csv"
    trace.write_text("arrival_s,input_tokens,output_tokens\n0,40,3\n0.1,50,2\n")
    done = run(app, trace=str(trace), requests=10)
    assert done.requests["output_tokens"].tolist() == [3, 2]
    assert "2 requests" in done.record.notes[0]


@pytest.mark.parametrize(
    ("spec", "error"),
    [
        ({"input_tokens": 5000}, BenchmarkError),  # longer than the context
        ({"dataset": "no-such-dataset"}, BenchmarkError),
        ({"trace": "/nowhere.csv"}, BenchmarkError),
        ({"url": "http://127.0.0.1:9/v1"}, ServerUnreachableError),
    ],
)
def test_what_cannot_run_is_refused_before_it_does(app, spec, error):
    before = len(saved.listed(app.home_dir))
    with pytest.raises(error):
        run(app, requests=2, **spec)
    assert len(saved.listed(app.home_dir)) == before


def test_a_server_by_its_address_alone(app, tmp_path):
    """From another HOME_DIR the app is a stranger: no token, no records, but figures."""
    other = settings_of(tmp_path / "other")
    done = run(other, url=app.url, requests=4, input_tokens=40, output_tokens=3)
    assert done.record.figures["num_ok"] == 4
    assert done.record.engine is None
    assert done.record.agreement is None
    assert any("own records" in note for note in done.record.notes)
    with pytest.raises(UnknownModelError):
        run(other, url=app.url, model="gpt-17", requests=1)


def test_a_job_of_the_app_runs_it_and_logs_it_to_mlflow(app):
    from workbench import tracking

    spec = {"requests": 6, "concurrency": 2, "input_tokens": 40, "output_tokens": 5, "name": "from a job"}
    with open_store(app.home_dir) as store:
        jobs = Jobs(store, app.home_dir)
        with pytest.raises(BenchmarkError):
            jobs.submit("benchmark", {**spec, "rate": 3})
        job = jobs.wait(jobs.submit("benchmark", spec).id, 120)
    assert job.state is JobState.DONE, (job.error, Path(job.log_path).read_text())
    assert job.result is not None
    record, table = saved.load(app.home_dir, job.result["id"])
    assert job.result["ttft_ms"] == record.figures["ttft_ms"]
    assert job.result["mlflow"] == record.mlflow

    client = tracking.client(app)
    logged = client.get_run(job.result["mlflow"]["run_id"])
    assert logged.info.status == "FINISHED"
    assert logged.info.run_name == "from a job"
    assert logged.data.metrics["ttft_ms/p95"] == pytest.approx(record.figures["ttft_ms"]["p95"])
    assert logged.data.metrics["output_tokens_per_s"] == pytest.approx(record.figures["output_tokens_per_s"])
    assert logged.data.params["output_tokens"] == "5"
    assert logged.data.params["target_model"] == "fake-echo"
    assert logged.data.tags["quire.plan_digest"] == record.plan_digest
    assert {item.path for item in client.list_artifacts(logged.info.run_id)} >= {
        "requests.json",
        "benchmark.json",
    }
    rows = json.loads(
        Path(client.download_artifacts(logged.info.run_id, "requests.json", str(app.home_dir))).read_text()
    )
    assert len(rows["data"]) == len(table) == 6
    assert "ttft_ms" in rows["columns"]


def test_a_cancelled_job_keeps_the_figures_so_far(app):
    with open_store(app.home_dir) as store:
        jobs = Jobs(store, app.home_dir)
        job = jobs.submit(
            "benchmark", {"requests": 5000, "concurrency": 2, "input_tokens": 40, "output_tokens": 20}
        )
        deadline = time.monotonic() + 60
        while not (jobs.get(job.id).partial or {}).get("figures") and time.monotonic() < deadline:
            time.sleep(0.1)
        jobs.cancel(job.id)
        job = jobs.wait(job.id, 60)
    assert job.state is JobState.CANCELLED
    assert job.partial is not None
    assert job.partial["cancelled"]
    assert 0 < job.partial["num_ok"] < 5000
    assert saved.load(app.home_dir, job.partial["id"])[0].cancelled


def test_a_full_disk_is_a_typed_error_and_leaves_nothing_half_written(app, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    done = run(app, requests=2, input_tokens=40, output_tokens=3)
    before = sorted(saved.folder_of(app.home_dir).iterdir())
    changed = done.record.model_copy(update={"title": "changed", "id": "bench-other"})
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(BenchmarkNotSavedError, match="No space"):
        saved.save(app.home_dir, changed, done.requests)
    with pytest.raises(BenchmarkNotSavedError, match="No space"):
        saved.update(app.home_dir, done.record.model_copy(update={"title": "changed"}))
    monkeypatch.undo()
    assert sorted(saved.folder_of(app.home_dir).iterdir()) == before
    assert saved.load(app.home_dir, done.record.id)[0] == done.record


def test_mlflow_being_down_loses_no_benchmark(app):
    away = app.model_copy(update={"mlflow_tracking_uri": f"http://127.0.0.1:{free_port()}"})
    done = run_benchmark(parse({"requests": 2, "input_tokens": 40, "output_tokens": 3}), away)
    assert done.record.mlflow is None
    assert any("Not logged to MLflow" in note for note in done.record.notes)
    assert saved.load(app.home_dir, done.record.id)[0] == done.record


def test_two_benchmarks_are_compared_in_pairs_of_the_same_plan(app):
    spec = {"requests": 16, "concurrency": 2, "input_tokens": 40, "output_tokens": 8}
    one, two = run(app, **spec), run(app, **spec)
    first, second = ((each.record, each.requests) for each in (one, two))
    itself = compare_benchmarks(first, first)
    for figure in itself["metrics"].values():
        assert figure["ratio"] == 1
        assert figure["verdict"] == "not proven"
    assert itself["metrics"]["ttft_ms_p50"]["low"] == itself["metrics"]["ttft_ms_p50"]["high"] == 1  # pairs
    assert itself["differences"] == {}
    both = compare_benchmarks(first, second)
    assert both["paired"]
    assert (
        both["metrics"]["e2e_ms_mean"]["low"]
        <= both["metrics"]["e2e_ms_mean"]["ratio"]
        <= both["metrics"]["e2e_ms_mean"]["high"]
    )
    slower = two.requests.assign(
        **{name: two.requests[name] * 1.5 for name in ("ttft_ms", "tpot_ms", "e2e_ms")}
    )
    against = compare_benchmarks(second, (two.record, slower))
    assert against["metrics"]["e2e_ms_p95"]["ratio"] == pytest.approx(1.5)
    assert against["metrics"]["e2e_ms_mean"]["verdict"] == "worse"
    unpaired = compare_benchmarks(first, (run(app, **{**spec, "seed": 9}).record, two.requests))
    assert not unpaired["paired"]


class Cli:
    """`quire bench …` in a process of its own."""

    def __init__(self, settings: Settings, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "workbench.cli", "bench", *arguments], env=clean_environment(settings), cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def end(self, timeout_s: float = 60.0) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, out, err


def test_the_command_line_ends_with_one_json_object(app, capsys):
    code, out, err = Cli(
        app, "run", "--concurrency", "2", "--requests", "5", "--input-tokens", "40", "--output-tokens", "4",
        "--no-mlflow", "--json",
    ).end()  # fmt: skip
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"):
        assert set(result[name]) == {"mean", "p50", "p95", "p99"}
    assert result["num_requests"] == 5
    assert result["output_tokens_per_s"] > 0
    assert "TTFT" in err

    home = ["--home-dir", str(app.home_dir), "--json"]
    assert main(["bench", "list", *home]) == 0
    assert json.loads(capsys.readouterr().out)["benchmarks"][0]["id"] == result["id"]
    assert main(["bench", "compare", result["id"], "latest", *home]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["ttft_ms_p50"]["ratio"] == 1
    assert main(["bench", "compare", "bench-none", "latest", *home]) == 2


@pytest.mark.parametrize(
    "arguments", [["--requests", "0"], ["--rate", "0"], ["--url", "nonsense"], ["--trace", "/nowhere.csv"]]
)
def test_the_command_line_refuses_bad_input_with_exit_code_2(tmp_path, capsys, arguments):
    assert main(["bench", "run", *arguments, "--home-dir", str(tmp_path)]) == 2
    assert "quire" in capsys.readouterr().err.lower()


def test_ctrl_c_keeps_what_there_is(app):
    cli = Cli(
        app, "run", "--concurrency", "1", "--requests", "4000", "--input-tokens", "30", "--output-tokens", "30",
        "--no-mlflow", "--json",
    )  # fmt: skip
    assert cli.process.stderr is not None
    while "Warming up" not in cli.process.stderr.readline():
        assert cli.process.poll() is None
    time.sleep(1.5)
    cli.process.send_signal(signal.SIGINT)
    code, out, _ = cli.end()
    assert code == 130
    result = json.loads(out.splitlines()[-1])
    assert result["cancelled"]
    assert 1 <= result["num_ok"] < 4000
    record, table = saved.load(app.home_dir, result["id"])
    assert record.cancelled
    assert len(table) == result["num_ok"] + result["num_cancelled"]
    backend = AppBackend(RunState(app.run_dir).read())
    deadline = time.monotonic() + 5
    while backend.stats().num_running and time.monotonic() < deadline:
        time.sleep(0.02)
    assert backend.stats().num_running == 0  # the server was told
    backend.close()


@pytest.mark.full
def test_without_an_app_it_brings_its_own_engine_and_leaves_nothing(tiny_model, tmp_path):
    settings = settings_of(tmp_path / "home", model=str(tiny_model), threads=1, num_blocks=128).model_copy(
        update={"fake": False}
    )
    done = run(settings, requests=6, concurrency=2, input_tokens=50, output_tokens=8)
    record = done.record
    assert record.figures["num_ok"] == 6
    assert record.figures["output_tokens"]["min"] == 8  # past the model's own end
    assert 0 < record.engine["limit"]["share_of_limit"] < 1
    assert record.engine["limit"]["machine_bytes_per_s"] > 1e8
    assert record.engine["limit"]["machine_flops_per_s"] > 1e8
    assert record.engine["limit"]["bound_by"] in ("weights", "KV", "compute", "host")
    assert sum(record.engine["limit"]["seconds"].values()) > 0
    assert record.target["version_digest"]
    assert RunState(settings.run_dir).read() is None
    with pytest.raises(ServerUnreachableError):
        run(settings, url=record.target["url"], requests=1)


@pytest.mark.full
def test_a_model_that_cannot_be_loaded_is_told(tmp_path):
    settings = settings_of(tmp_path / "home", model=str(tmp_path / "nothing")).model_copy(
        update={"fake": False}
    )
    with pytest.raises(BenchmarkError, match="no model"):
        run(settings, requests=1)
