"""GPU benchmarks at reduced size: counts, tables and records are whole. What they measure is judged on a GPU only."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.bench import __main__ as bench
from engine.bench import gpu
from engine.bench.lifecycle import HostWeights
from engine.bench.parts.random_engine import random_engine
from engine.bench.parts.session import Session
from engine.bench.parts.shapes import TINY
from engine.bench.parts.throughput import ABLATIONS, measure_ablations
from engine.bench.parts.workload import OutOfTime, equal_requests, run_workload
from engine.bench.serve_8b import BAR, FP8_BAR
from engine.build import build_engine
from engine.config import EngineConfig
from engine.limits import Limits

CPU = torch.device("cpu")
BOUNDS = {"weights", "KV", "compute", "host"}
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a GPU")


def run_tiny(name: str, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[dict[str, Any], str]:
    """Figures and printed text of one benchmark at reduced size."""
    assert bench.main([name, "--tiny", *options]) == 0
    printed = capsys.readouterr().out
    record = json.loads(printed.splitlines()[-1])
    assert record["name"] == name
    figures = record["figures"]
    assert figures["reduced_size"] is True
    assert {v["verdict"] for v in figures["verdicts"]} == {"not judged"}
    return figures, printed


def check_phases(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert row["bound_by"] in BOUNDS
        assert row["wall_s"] >= row["device_s"]
        assert 0 < row["floor_s"] <= row["weights_s"] + row["kv_s"] + row["compute_s"] + 1e-5


@pytest.mark.parametrize(
    ("name", "requests", "output_tokens", "ablations"),
    [
        ("serve-8b", 4, 64, {"graphs off", "overlap off", "prefix cache off"}),
        pytest.param(
            "nano", 6, 100, {"graphs off", "overlap off", "prefix cache off"}, marks=pytest.mark.full
        ),
        pytest.param("single", 1, 12, {"graphs off", "overlap off"}, marks=pytest.mark.full),
    ],
)
def test_throughput_benchmarks_run_their_whole_workload(name, requests, output_tokens, ablations, capsys):
    figures, printed = run_tiny(name, capsys, "--peer-seconds", "0")
    assert (figures["requests"], figures["output_tokens"]) == (requests, output_tokens)
    check_phases(figures["phases"])
    assert {row["phase"] for row in figures["phases"]} == {"prefill", "decode"}
    measured = {row["variant"]: row["seconds"] for row in figures["ablations"]}
    assert set(measured) == {"as it is", "as it is, again", *ablations}
    assert min(measured.values()) > 0
    assert figures["peers"] == []
    assert "peers: left out" in printed


def test_the_same_requests_are_served_with_an_fp8_cache(capsys):
    figures, printed = run_tiny("serve-8b", capsys, "--peer-seconds", "0", "--no-ablations")
    assert figures["fp8_kv"]["seconds"] > 0
    assert 0 < figures["fp8_kv"]["floor_s"] < figures["floor_s"], "less is read"
    assert [v["what"] for v in figures["verdicts"]] == [BAR.what, FP8_BAR.what]
    assert "with an fp8 KV cache" in printed


@no_gpu  # on a GPU there may be quantized weights
def test_a_precision_that_the_engine_has_not_is_a_row_that_says_so(capsys):
    figures, _ = run_tiny("single", capsys, "--peer-seconds", "0", "--no-ablations")
    plain, *others = figures["precisions"]
    assert plain["tokens_s"] > 0
    assert plain["of_floor"] == pytest.approx(plain["tokens_s"] / plain["floor_tokens_s"], abs=1e-4)
    assert all(row["tokens_s"] or row["note"].startswith("absent: ") for row in others)
    assert len(figures["verdicts"]) == 1 + sum(row["tokens_s"] is not None for row in others)


def test_prefill_computes_the_new_tenth_of_a_warm_prompt_only(capsys):
    figures, _ = run_tiny("prefill", capsys)
    assert [(case["case"], case["tokens"]) for case in figures["cases"]] == [
        ("1 × 96", 96), ("4 × 32", 128), ("warm", 16), ("warm, prefix cache off", 96), ("returns from the host", 16),
        ("returns, host tier off", 80),
    ]  # fmt: skip
    returned, computed = (case["longest_ttft_s"] for case in figures["cases"][-2:])
    assert figures["returned_over_computed"] == pytest.approx(returned / computed, abs=1e-4)
    assert figures["cached_tokens"] == 80  # whole blocks of 16 in 90 % of 96
    for case in figures["cases"]:
        assert case["of_floor"] == pytest.approx(case["floor_s"] / case["seconds"], abs=1e-4)
        assert 0 < case["longest_ttft_s"] <= case["seconds"]
        assert case["bound_by"] in BOUNDS


def test_mixed_lets_every_prompt_that_arrives_end(capsys):
    figures, _ = run_tiny("mixed", capsys)
    assert {row["variant"] for row in figures["variants"]} == {"as it is", "overlap off", "graphs off"}
    for row in figures["variants"]:
        assert row["prompts"] == 2
        assert row["itl_ratio"] == pytest.approx(row["p99_itl_ms"] / row["decode_itl_ms"])
        assert 0 <= row["idle_share"] < 1
        # Six sequences at most, each with a last block of up to 15 empty places of at least 32.
        assert 0 < row["kv_waste"] < 15 / 32
        check_phases(row["phases"])


def test_invariant_compares_both_modes_and_the_same_requests_alone(capsys):
    figures, _ = run_tiny("invariant", capsys)
    off, on = figures["modes"]
    assert figures["slow_down"] == pytest.approx(on["seconds"] / off["seconds"] - 1)
    assert figures["output_tokens"] == 4 * 4
    assert figures["same_alone"] == 2


def test_adapters_compares_eight_in_one_batch_with_the_base(capsys):
    figures, _ = run_tiny("adapters", capsys)
    base, *others = figures["variants"]
    assert [row["variant"] for row in others] == ["8 adapters", "slots, no adapter", "one adapter"]
    assert base["rounds"] == 2  # before and after
    for row in others:
        assert row["share"] == pytest.approx(base["seconds"] / row["seconds"])
    assert figures["share"] == others[0]["share"]
    assert [verdict["value"] for verdict in figures["verdicts"]] == [figures["share"], figures["swap_s"]]
    assert (figures["requests"], figures["output_tokens"]) == (8, 8 * 6)
    check_phases(figures["phases"])


def test_structured_compares_runs_with_a_grammar_and_without(capsys):
    figures, _ = run_tiny("structured", capsys)
    assert [row["engine"] for row in figures["engines"]] == ["FakeRunner, 0 ms a step", "tiny on cpu"]
    for row, verdict in zip(figures["engines"], figures["verdicts"], strict=True):
        assert row["lowest"] <= row["cost"] == verdict["value"] <= row["highest"]
        assert row["rounds"] == 2


@pytest.mark.full
@no_gpu
def test_attention_without_a_gpu_checks_its_results():
    # In a process of its own: Triton reads whether to interpret when kernels are imported.
    command = [sys.executable, "-m", "engine.bench", "attention"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    errors = json.loads(done.stdout.splitlines()[-1])["figures"]["correctness"]
    assert {name.split()[0] for name in errors} == {"decode", "mixed", "prefill"}
    assert {"mixed fp8 float32", "mixed int8 float32"} < set(errors)
    assert max(errors.values()) <= 1.0


def test_lifecycle_starts_a_process_that_answers(capsys):
    figures, _ = run_tiny("lifecycle", capsys)
    (start,) = figures["starts"]
    assert start["total"] > start["imports"] + start["build"] + start["first_token"]
    assert figures["swap_s"] > 0
    assert figures["bytes_left"] is None or figures["bytes_left"] == 0


def test_host_weights_make_the_same_model_and_the_same_checkpoint(tmp_path):
    kept = HostWeights()
    prompts = equal_requests("same", 2, 12, 6, 512)
    limits: dict[str, Any] = {"max_num_seqs": 2, "max_model_len": 32}
    with random_engine(TINY, CPU, load=kept.fill_and_keep, **limits) as engine:
        expected = run_workload(engine, prompts).outputs
    with random_engine(TINY, CPU, load=kept.load, **limits) as engine:
        assert run_workload(engine, prompts).outputs == expected
    kept.save(TINY, tmp_path)
    settings: dict[str, Any] = {"dtype": "float32", "device": "cpu", "attention_backend": "reference"}
    engine = build_engine(EngineConfig(model=str(tmp_path), num_threads=1, **settings, **limits))
    assert run_workload(engine, prompts).outputs == expected
    engine.close()


def test_gpu_saves_one_record_a_benchmark(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["gpu", "--tiny", "--save", "--no-ablations", "--only", "prefill", "single"]
    assert bench.main(arguments) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(record["figures"]["benchmarks"]) == ["single", "prefill"]  # in order of value
    assert record["figures"]["failed"] == []
    saved = {}
    for path in (tmp_path / "data/results").iterdir():
        content = json.loads(path.read_text())
        saved[content["name"]] = content["figures"]
    assert set(saved) == {"gpu", "single", "prefill"}
    assert saved["single"]["limits"] == saved["prefill"]["limits"] == record["figures"]["limits"]
    for name in ("single", "prefill"):
        assert record["figures"]["benchmarks"][name]["verdicts"] == saved[name]["verdicts"]


def options(**changes: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    gpu.add_arguments(parser)
    return argparse.Namespace(**vars(parser.parse_args(["--tiny"])) | {"save": False} | changes)


def session(left_s: float, *, is_tiny: bool = True) -> Session:
    return Session(CPU, Limits(1e10, 1e10), is_tiny, time.monotonic() + left_s)


def test_gpu_leaves_out_what_the_budget_does_not_hold(capsys, monkeypatch):
    found = gpu._run_one("nano", session(10, is_tiny=False), options())
    assert list(found) == ["left_out"]
    assert "nano: left out" in capsys.readouterr().out
    monkeypatch.setattr(Session, "has_room", lambda *asked: True)
    stopped = gpu._run_one("nano", session(0.0), options())
    assert stopped == {"left_out": "the budget ended while it ran"}


def test_gpu_goes_on_after_a_benchmark_that_fails(capsys):
    found = gpu._run_one("no-such-benchmark", session(10), options())
    assert found == {"failed": "ModuleNotFoundError: No module named 'engine.bench.no_such_benchmark'"}
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("name", gpu.BENCHMARKS)
def test_every_benchmark_of_the_gpu_run_can_be_named_alone(name, capsys):
    with pytest.raises(SystemExit) as caught:
        bench.main([name, "--help"])
    assert caught.value.code == 0
    assert "--tiny" in capsys.readouterr().out


@no_gpu
@pytest.mark.parametrize("name", ["gpu", "serve-8b"])
def test_without_a_gpu_full_size_is_refused(name, capsys):
    with pytest.raises(SystemExit) as caught:
        bench.main([name])
    assert caught.value.code == 2
    assert "--tiny" in capsys.readouterr().err


def test_a_run_that_outlasts_the_budget_leaves_the_engine_idle():
    prompts = equal_requests("long", 2, 12, 20, 512)
    with random_engine(TINY, CPU, max_num_seqs=2, max_model_len=32) as engine:
        with pytest.raises(OutOfTime):
            run_workload(engine, prompts, ends_at=time.monotonic() - 1)
        assert not engine.has_work
        engine.check_integrity()
        assert run_workload(engine, prompts.with_output(2)).num_output_tokens == 4


def test_ablations_end_with_the_budget():
    prompts = equal_requests("one", 1, 12, 2, 512)
    (row,) = measure_ablations(session(0), TINY, prompts, ("graphs off",))
    assert row["note"].startswith("stopped: the budget ended")
    assert row["seconds"] is None


def test_an_ablation_that_the_engine_has_not_is_absent(monkeypatch):
    monkeypatch.setitem(ABLATIONS, "unheard-of off", {"enable_unheard_of": False})
    prompts = equal_requests("one", 1, 12, 2, 512)
    rows = measure_ablations(session(100), TINY, prompts, ("unheard-of off",))
    assert [bool(row["seconds"]) for row in rows] == [True, False, True]
    assert rows[1]["note"].startswith("absent: unknown engine setting")
