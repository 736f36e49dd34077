"""Runs as the workbench logs them: two benchmarks, and two evaluations of one dataset, written to a running MLflow."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "pages"))  # benchmark_world

from benchmark_world import save_benchmark

from workbench.bench import saved
from workbench.bench.track import log_benchmark
from workbench.evals.datasets import Dataset, Example
from workbench.evals.evaluate import Evaluation, EvaluationOptions, Row
from workbench.evals.record import save_evaluation
from workbench.evals.scorers import Metric
from workbench.settings import Settings


def log_two_benchmarks(settings: Settings) -> list[str]:
    """A slow and a fast one; their run ids."""
    runs = []
    for name, ttft_ms in (("slow", 40), ("fast", 20)):
        record = save_benchmark(settings, ttft_ms=ttft_ms, name=name)
        logged = log_benchmark(settings, record, saved.load(settings.home_dir, record.id)[1])
        saved.update(settings.home_dir, record.model_copy(update={"mlflow": logged}))
        runs.append(logged["run_id"])
    return runs


def log_two_evaluations(settings: Settings) -> list[str]:
    """Two versions on the same eight examples, the second better; their run ids."""
    examples = tuple(
        Example(f"t-{i}", ({"role": "user", "content": f"Message {i}"},), f"answer {i}", {"slice": "calm"})
        for i in range(8)
    )
    dataset = Dataset("messages", "d" * 64, examples)
    runs = []
    for version, right in (("extractor/1", 4), ("extractor/2", 6)):
        rows = tuple(
            Row(
                e.id,
                {"exact_match": float(i < right)},
                e.expected if i < right else "wrong",
                (1, 2),
                -0.5,
                "stop",
                7,
            )
            for i, e in enumerate(examples)
        )
        evaluation = Evaluation(
            version, version, dataset, (Metric("exact_match"),), EvaluationOptions(), rows, "test"
        )
        runs.append(save_evaluation(evaluation, settings))
    return runs
