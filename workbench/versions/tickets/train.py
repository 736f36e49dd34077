"""Trains and judges the ticket versions: `python -m workbench.versions.tickets.train --base MODEL --out DIR --version v1`.

`--version` takes v1 to v4, `all` (these four), `candidates` (everything they were chosen from) or candidates' names. Each gets
`DIR/NAME/adapter/`, `DIR/NAME/evaluation.json` and a log; `DIR/results.json` and the last line printed hold the summary. A
name that is done already is kept, an interrupted one goes on. It neither chooses nor registers.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from workbench.versions.adapter import is_adapter
from workbench.versions.finetune import ADAPTER, Progress, finetune
from workbench.versions.merge import merge
from workbench.versions.tickets.dataset import PER_ISSUE
from workbench.versions.tickets.evaluate import evaluate_folder, evaluation_set, summary
from workbench.versions.tickets.recipes import CANDIDATES, VERSIONS, WEAK_ISSUE

EVALUATION = "evaluation.json"
RESULTS = "results.json"
_PACK_BYTES = 14 * 2**20


def train_one(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Fine-tunes one name and judges it, unless that is done; its evaluation."""
    folder: Path = arguments.out / name
    done = folder / EVALUATION
    if done.is_file():
        return dict(json.loads(done.read_text("utf-8")))
    recipe = CANDIDATES[VERSIONS.get(name, name)]
    if recipe.start and not is_adapter(arguments.out / recipe.start / ADAPTER):
        train_one(recipe.start, arguments)
    config = recipe.config(arguments.base, arguments.out, name, arguments.device, arguments.processes)
    if arguments.steps:
        config = replace(
            config, steps=arguments.steps, data=replace(recipe.data, num_examples=arguments.examples)
        )
    adapter = finetune(config, _print_progress)
    if adapter is None:
        raise AssertionError("nothing ends this run early")
    evaluation = {"name": name, "recipe": asdict(recipe), **judge(arguments, adapter)}
    temporary = done.with_suffix(".partial")
    temporary.write_text(json.dumps(evaluation) + "\n", encoding="utf-8")
    os.replace(temporary, done)
    return evaluation


def judge(arguments: argparse.Namespace, adapter: Path) -> dict[str, Any]:
    """Scores of an adapter on the held-out tickets: summary by slice, and every answer."""
    begin = time.perf_counter()
    device = torch.device("cuda" if arguments.device == "auto" and torch.cuda.is_available() else "cpu")
    examples = evaluation_set(arguments.per_issue)
    with tempfile.TemporaryDirectory() as temporary:
        merged = merge(arguments.base, adapter, Path(temporary) / "merged")
        scores = evaluate_folder(merged, examples, device, 512 if device.type == "cuda" else 32)
    return {
        "summary": summary(examples, scores),
        "scores": [asdict(score) for score in scores],
        "wall_s": round(time.perf_counter() - begin, 1),
    }


def _print_progress(progress: Progress) -> None:
    if progress.step % 20 == 0 or progress.step == progress.steps:
        rate = progress.tokens / max(progress.wall_s, 1e-9)
        print(
            f"step {progress.step}/{progress.steps} loss {progress.loss:.4f} tokens {progress.tokens} "
            f"{rate:.0f} tokens/s",
            flush=True,
        )


def train_beside(names: list[str], arguments: argparse.Namespace) -> None:
    """Trains several names at once, each in a process of its own with its output in its log."""

    def run(name: str) -> int:
        (arguments.out / name).mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            "-m",
            "workbench.versions.tickets.train",
            *_forwarded(arguments),
            "--version",
            name,
        ]
        with (arguments.out / name / "log.txt").open("ab") as log:
            status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
        print(
            f"{name}: {'done' if status == 0 else f'failed with status {status}, see its log.txt'}",
            flush=True,
        )
        return status

    recipes = {name: CANDIDATES[VERSIONS.get(name, name)] for name in names}
    longest_first = sorted(names, key=lambda name: -recipes[name].steps * recipes[name].batch_tokens)
    for has_start in (False, True):  # what continues another waits for all of those
        with ThreadPoolExecutor(arguments.jobs) as runs:
            list(runs.map(run, [name for name in longest_first if bool(recipes[name].start) is has_start]))


def _forwarded(arguments: argparse.Namespace) -> list[str]:
    given = ["--base", str(arguments.base), "--out", str(arguments.out), "--device", arguments.device]
    for name in ("processes", "threads", "per_issue", "steps", "examples"):
        if getattr(arguments, name) is not None:
            given += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    return given


def results(names: list[str], out: Path) -> dict[str, Any]:
    """Summaries of what is done, and the paired differences in exact match of every pair."""
    done = {
        n: json.loads((out / n / EVALUATION).read_text("utf-8"))
        for n in names
        if (out / n / EVALUATION).is_file()
    }
    exact = {name: [row["exact"] for row in evaluation["scores"]] for name, evaluation in done.items()}
    pairs = {f"{b} - {a}": paired_difference(exact[a], exact[b]) for a in exact for b in exact if a != b}
    return {
        "missing": sorted(set(names) - done.keys()),
        "exact_match": {name: e["summary"]["all"]["exact_match"] for name, e in done.items()},
        "field_f1": {name: e["summary"]["all"]["field_f1"] for name, e in done.items()},
        f"exact_match_{WEAK_ISSUE}": {
            name: e["summary"][f"slice={WEAK_ISSUE}"]["exact_match"] for name, e in done.items()
        },
        "differences": pairs,
    }


def paired_difference(a: list[float], b: list[float]) -> list[float]:
    """Mean of b - a with its normal 95 % interval: a first look, not the comparison that a gate decides by."""
    differences = [y - x for x, y in zip(a, b, strict=True)]
    count = len(differences)
    mean = sum(differences) / count
    spread = 1.959964 * math.sqrt(sum((d - mean) ** 2 for d in differences) / count / count)
    return [round(mean, 4), round(mean - spread, 4), round(mean + spread, 4)]


def pack(out: Path, target: Path) -> None:
    """Tar files of all runs, under 14 MiB each: what has to be carried to another machine."""
    target.mkdir(parents=True, exist_ok=True)
    files = [f for f in sorted(out.rglob("*")) if f.is_file() and not f.name.startswith("checkpoint")]
    groups: list[list[Path]] = [[]]
    size = 0
    for file in (f for f in files if target not in f.parents):
        size += file.stat().st_size + 2048
        if size > _PACK_BYTES:
            groups.append([])
            size = file.stat().st_size + 2048
        groups[-1].append(file)
    for number, group in enumerate(groups):
        with tarfile.open(target / f"candidates-{number}.tar", "w") as archive:
            for file in group:
                archive.add(file, file.relative_to(out))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--out", type=Path, required=True, help="work folder")
    parser.add_argument("--version", nargs="+", required=True, help="v1 v2 v3 v4, all, candidates, or names")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--jobs", type=int, default=1, help="how many to train at once, each in its own process"
    )
    parser.add_argument(
        "--processes", type=int, default=0, help="processes that encode the data, for each of them"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--per-issue", type=int, default=PER_ISSUE, help="held-out tickets of each issue")
    parser.add_argument("--steps", type=int, help="a trial: so many steps instead of the recipe's")
    parser.add_argument("--examples", type=int, default=200, help="of a trial")
    parser.add_argument("--pack", type=Path, help="afterwards write everything into tar files in this folder")
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    names: list[str] = []
    for name in arguments.version:
        names += {"all": list(VERSIONS), "candidates": list(CANDIDATES)}.get(name, [name])
    unknown = sorted(set(names) - VERSIONS.keys() - CANDIDATES.keys())
    if unknown:
        raise SystemExit(
            f"no such version: {', '.join(unknown)}; there are {', '.join([*VERSIONS, *CANDIDATES])}"
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    if len(names) == 1:
        print(json.dumps(train_one(names[0], arguments)["summary"]))
        return
    train_beside(names, arguments)
    found = results(names, arguments.out)
    (arguments.out / RESULTS).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if arguments.pack:
        pack(arguments.out, arguments.pack)
    print(json.dumps(found))
    if found["missing"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
