"""Writes the shipped evaluation dataset: `python -m workbench.versions.tickets.dataset data/datasets/ticket-extractor.jsonl`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from workbench.versions.tickets.generator import held_out_examples

EVALUATION_SEED = 2026
PER_ISSUE = 60


def dataset_text() -> str:
    """The whole file: held-out values and phrasings, as many tickets of every issue."""
    rows = (example.record() for example in held_out_examples(EVALUATION_SEED, PER_ISSUE))
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main() -> None:
    Path(sys.argv[1]).write_text(dataset_text(), encoding="utf-8")


if __name__ == "__main__":
    main()
