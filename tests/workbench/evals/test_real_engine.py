"""Two real models, a real engine, a real store: the commands from their arguments to their exit codes."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from workbench.commands import compare as compare_command
from workbench.commands import gate as gate_command
from workbench.evals.compare import compare_evaluations
from workbench.evals.datasets import load_dataset
from workbench.evals.evaluate import EvaluationOptions, check_repeatable, evaluate
from workbench.evals.scorers import make_scorers

Make = Callable[..., Any]
SCORER = "def length(example, answer):\n    return len(answer.text)\nlength.bounded = False\n"


@pytest.fixture(scope="module")
def models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models of the same shape; the second one's weights are others, and it is far too sure of its random guesses."""
    from safetensors.numpy import load_file, save_file

    other = tmp_path_factory.mktemp("other") / "tiny-other"
    shutil.copytree(tiny_model, other)
    weights = load_file(other / "model.safetensors")
    noise = np.random.default_rng(3)
    changed = {k: (v + 0.02 * noise.standard_normal(v.shape)).astype(v.dtype) for k, v in weights.items()}
    changed["model.embed_tokens.weight"] *= 3
    save_file(changed, other / "model.safetensors", metadata={"format": "pt"})
    return tiny_model, other


@pytest.fixture(autouse=True)
def _home(shared_home: Path, _environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME_DIR", str(shared_home))


@pytest.fixture
def questions(write_dataset: Make) -> Path:
    words = ["cat", "dog", "house", "tree", "small", "large"]
    lines = [
        {
            "id": f"q{i}",
            "messages": [{"role": "user", "content": " ".join(words[(i + k) % 6] for k in range(1 + i % 7))}],
            "expected": "the",
            "tags": {"slice": "long" if i % 7 > 3 else "short"},
        }
        for i in range(24)
    ]
    return write_dataset(lines, "questions.jsonl")


@pytest.fixture
def backend(models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Any:
    from workbench.connect import connect

    monkeypatch.setenv("QUIRE_MODEL", str(models[0]))
    monkeypatch.setenv("QUIRE_THREADS", "1")
    with connect() as made:
        yield made


def test_a_model_against_itself_is_zero_on_every_row_by_two_loads_in_other_batches(
    backend: Any, models: tuple[Path, Path], questions: Path, tmp_path: Path
) -> None:
    """Tokens, log-probabilities and scores are the same to the last bit; another model's are not."""
    (tmp_path / "mine.py").write_text(SCORER)
    scorers = make_scorers([f"python:{tmp_path}/mine.py:length", "contains", "perplexity"])
    dataset = load_dataset(questions)
    runs = []
    for ref, options in (
        (models[0], EvaluationOptions(max_tokens=24, temperature=0.8)),
        (models[0], EvaluationOptions(max_tokens=24, temperature=0.8, max_concurrency=3, order_seed=5)),
        (models[1], EvaluationOptions(max_tokens=24, temperature=0.8)),
    ):
        model_id = backend.load(str(ref), deterministic=True)
        runs.append(evaluate(backend, model_id, dataset, scorers, options, version=str(ref)))
        assert check_repeatable(backend, runs[-1], requests=8).proven
        backend.unload(model_id)
        assert model_id not in backend.models()
    first, again, other = runs
    for one, two in zip(first.rows, again.rows, strict=True):
        assert (one.token_ids, one.logprob, one.scores) == (two.token_ids, two.logprob, two.scores)
    assert len({row.output for row in first.rows}) > 12  # not one answer for all
    same = compare_evaluations(first, again)
    assert all(m.diff == 0 and m.wins == m.losses == 0 for m in [*same.metrics.values(), *same.slices])
    assert sum(a.token_ids != b.token_ids for a, b in zip(first.rows, other.rows, strict=True)) > 12
    assert compare_evaluations(first, other).metrics["perplexity"].diff != 0


def arguments(command: Any, *given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add(parser.add_subparsers())
    return parser.parse_args(given)


@pytest.mark.full
def test_quire_compare_ends_with_one_line_of_json(
    models: tuple[Path, Path],
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from workbench.evals import record
    from workbench.settings import load

    monkeypatch.setenv("QUIRE_MODEL", str(models[0]))
    monkeypatch.setenv("QUIRE_THREADS", "1")
    given = arguments(
        compare_command, "compare", str(models[0]), str(models[1]), "--dataset", str(questions), "--json", "--scorer",
        "contains", "--scorer", "perplexity", "--max-tokens", "12",
    )  # fmt: skip
    assert given.run(given) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out.splitlines()[-1])
    assert set(result["metrics"]) == {"contains", "perplexity"}
    for metric in result["metrics"].values():
        assert {"a", "b", "diff", "low", "high", "n"} <= set(metric)
        assert metric["n"] == 24
        assert metric["diff"] == pytest.approx(metric["b"] - metric["a"])
    assert result["verdict"] in ("promote", "not proven", "refuse")
    assert result["repeatable"] == {"checked": 16, "equal": 16, "differing": []}
    assert result["speed"]["tpot_ms"]["a"] > 0
    assert "Verdict:" in captured.err
    assert len(record.load_table(load(), result["run_id"])) == 24
    the_notebook_shows_the_same(result, tmp_path)


def the_notebook_shows_the_same(result: dict[str, Any], folder: Path) -> None:
    """`compare_versions` executed by papermill in a kernel of its own, on the recorded run."""
    import papermill

    from workbench.runs.notebooks import bundled_notebooks
    from workbench.runs.record import find_record

    executed = papermill.execute_notebook(
        str(bundled_notebooks() / "compare_versions.ipynb"), str(folder / "out.ipynb"),
        parameters={"run_id": result["run_id"]}, kernel_name="python3", progress_bar=False, cwd=str(folder),
    )  # fmt: skip
    found = find_record(executed)
    assert found is not None
    assert found.kind == "compare"
    assert found.values["verdict"] == result["verdict"]
    for name, metric in {**result["metrics"], **result["speed"]}.items():
        for part in ("a", "b", "diff", "low", "high", "n"):
            assert found.values[f"{name}_{part}"] == metric[part]


def test_quire_gate_promotes_what_is_better_and_refuses_what_is_worse(
    models: tuple[Path, Path],
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two registered versions of which one finds the expected answers likelier: one way it is promoted, the other refused."""
    from workbench.settings import load
    from workbench.versions.registry import Registry

    monkeypatch.setenv("QUIRE_MODEL", str(models[0]))
    monkeypatch.setenv("QUIRE_THREADS", "1")
    rules = tmp_path / "rules.toml"
    rules.write_text('[[rules]]\nkind = "better"\nmetric = "perplexity"\n')
    registry = Registry(load())
    for folder in models:
        registry.register("toy", base=folder)
    verdicts = {}
    for champion, candidate in ((1, 2), (2, 1)):
        registry.promote("toy", champion)
        given = arguments(
            gate_command, "gate", "toy", str(candidate), "--dataset", str(questions), "--rules", str(rules), "--promote",
            "--json", "--max-tokens", "4", "--scorer", "contains",
        )  # fmt: skip
        code = given.run(given)
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        verdicts[result["verdict"]] = result
        assert code == gate_command.EXIT_CODES[result["verdict"]]
        assert (result["champion"], result["candidate"]) == (champion, candidate)
        assert result["promoted"] == (code == 0)
        now = registry.get("toy", "@champion")
        assert now.ref.version == (candidate if code == 0 else champion)
        assert now.metrics["perplexity"] > 0
    assert set(verdicts) == {"promote", "refuse"}
    one, other = (verdicts[name]["metrics"]["perplexity"] for name in ("promote", "refuse"))
    assert (one["diff"], one["low"], one["high"]) == (-other["diff"], -other["high"], -other["low"])
    assert "is now version" in verdicts["promote"]["note"]
    reasons = [move.reason for move in registry.history("toy")]
    assert sum(verdicts["promote"]["run_id"] in reason for reason in reasons) == 1
    assert not any(verdicts["refuse"]["run_id"] in reason for reason in reasons)


@pytest.mark.parametrize(("name", "code"), [("promote", 0), ("not proven", 3), ("refuse", 4)])
def test_quire_gate_tells_its_verdict_by_the_exit_code(name: str, code: int) -> None:
    assert gate_command.EXIT_CODES[name] == code
