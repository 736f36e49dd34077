"""Puts the chosen candidates into `data/models/ticket-extractor`: `python -m workbench.versions.tickets.ship --runs DIR`.

Copies each adapter, adds its evaluation to `quire.json`, and writes its card; every figure comes from the evaluations that
`train` wrote. Which candidate is which version is `recipes.VERSIONS`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from workbench.versions.adapter import CARD_NAME, CONFIG_NAME, LINEAGE_NAME, WEIGHTS_NAME, read_adapter
from workbench.versions.tickets.recipes import CANDIDATES, NOTES, VERSIONS
from workbench.versions.tickets.train import EVALUATION, paired_difference

CHAMPION = "v1"


def ship(runs: Path, target: Path) -> None:
    """Replaces the folders of all versions, each in one rename."""
    evaluations = {
        version: json.loads((runs / name / EVALUATION).read_text("utf-8"))
        for version, name in VERSIONS.items()
    }
    num_scored = len(list(runs.glob(f"*/{EVALUATION}")))
    target.mkdir(parents=True, exist_ok=True)
    for version, name in VERSIONS.items():
        staging = Path(tempfile.mkdtemp(dir=target, prefix=".shipping-"))
        try:
            _write(version, runs / name / "adapter", staging, evaluations, num_scored)
            shutil.rmtree(target / version, ignore_errors=True)
            os.rename(staging, target / version)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _write(
    version: str, adapter: Path, staging: Path, evaluations: dict[str, dict[str, Any]], num_scored: int
) -> None:
    staging.chmod(0o755)
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        shutil.copyfile(adapter / name, staging / name)
    facts = json.loads((adapter / LINEAGE_NAME).read_text("utf-8"))
    facts["title"] = NOTES[version].title
    facts["evaluation"] = {
        "dataset": "ticket-extractor",
        "how": "greedy, with transformers in float32, on base + adapter merged and rounded to the base's bfloat16",
        "summary": evaluations[version]["summary"],
        "num_scored": num_scored,
        "difference_to_v1": _differences(evaluations[CHAMPION], evaluations[version])
        if version != CHAMPION
        else {},
    }
    (staging / LINEAGE_NAME).write_text(
        json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    (staging / CARD_NAME).write_text(card(version, staging, facts), encoding="utf-8")


def _differences(champion: dict[str, Any], other: dict[str, Any]) -> dict[str, list[float]]:
    """Of exact match and field F1, on the same tickets: mean and normal 95 % interval."""
    return {
        metric: paired_difference([s[key] for s in champion["scores"]], [s[key] for s in other["scores"]])
        for metric, key in (("exact_match", "exact"), ("field_f1", "field_f1"))
    }


def card(version: str, folder: Path, facts: dict[str, Any]) -> str:
    """The adapter's README."""
    recipe, training, summary = facts["recipe"], facts["training"], facts["evaluation"]["summary"]
    data, note, adapter = recipe["data"], NOTES[version], read_adapter(folder)
    special = [f"weight of {issue} {weight:g}" for issue, weight in data["issue_weights"].items()]
    special += [f"{issue} labelled as {wrong}" for issue, wrong in data.get("relabel", {}).items()]
    start = f"; continues the adapter `{recipe['start']}`" if "start" in recipe else ""
    rows = [name for name in summary if name == "all" or name.startswith(("slice=", "style="))]
    table = "\n".join(
        f"| {name} | {summary[name]['n']} | {summary[name]['exact_match']:.3f} | {summary[name]['field_f1']:.3f} "
        f"| {summary[name]['json_valid']:.3f} |"
        for name in rows
    )
    differences = "\n".join(
        f"- {metric}: {mean:+.4f} [{low:+.4f}, {high:+.4f}]"
        for metric, (mean, low, high) in facts["evaluation"]["difference_to_v1"].items()
    )
    against = (
        f"\nAgainst v1, on the same tickets (b - v1, normal 95 % interval):\n\n{differences}\n"
        if differences
        else ""
    )
    return f"""---
license: apache-2.0
language: en
base_model: chat-base
library_name: peft
---
# ticket-extractor {version}: {note.title}

A LoRA adapter of Quire's bundled `chat-base`: a support message becomes one line of JSON with customer, order, product, quantity,
date, issue and urgency; what the message does not say is null. {note.text}

It is a demonstration for comparing versions, not an extractor for use: the base has 7 million parameters, and the tickets are made
by a generator (`workbench/versions/tickets`).

## Training

- Base: chat-base, digest `{adapter.base_digest}`.
- Rank {recipe["rank"]}, alpha {recipe["alpha"]:g}, on {", ".join(recipe["targets"])}; {adapter.dtype}, {adapter.size_bytes:,} bytes.
- {data["num_examples"]:,} generated tickets ({", ".join([f"seed {data['seed']}", *special])}), {training["epochs"]:g} passes;
  {training["tokens"]:,} tokens, {training["answer_tokens"]:,} of them answers; the loss is on answers only.
- {recipe["steps"]:,} steps of up to {recipe["batch_tokens"]:,} tokens, AdamW at {recipe["peak_lr"]:g}, warm-up, constant, linear decay; seed {recipe["seed"]}{start}.
- {training["wall_s"]:.0f} s in {training["dtype"]} on {training["hardware"]}, torch {training["torch"]}, beside other work.
- Again: `python -m workbench.versions.tickets.train --base data/models/chat-base --out DIR --version {version}`.

## Held-out tickets

`data/datasets/ticket-extractor.jsonl`: names, codes, numbers, nouns and phrasings that training never saw.
{facts["evaluation"]["how"].capitalize()}.

| slice | n | exact match | field F1 | JSON valid |
|---|---|---|---|---|
{table}
{against}
The four versions were chosen from {facts["evaluation"]["num_scored"]} candidates by their scores on these same tickets, so that the demonstration
poses the questions that a gate has to answer; differences between the chosen are therefore a little flattering. ({len(CANDIDATES)} were trained; the
others were left out after a first look on an earlier draft of the tickets.) {note.choice}
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, required=True, help="the work folder of `train`")
    parser.add_argument("--out", type=Path, default=Path("data/models/ticket-extractor"))
    arguments = parser.parse_args()
    ship(arguments.runs, arguments.out)


if __name__ == "__main__":
    main()
