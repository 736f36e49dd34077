"""`quire gate NAME CANDIDATE --dataset D`: may this version become the champion?

Exit code 0: promote; 3: not proven; 4: refuse. 1 and 2 mean that there was no verdict: a failure, or bad input. With --promote
a version that passes becomes the champion.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from workbench.commands.compare import absolute, add_dataset_options, as_text, run_job

EXIT_CODES = {"promote": 0, "not proven": 3, "refuse": 4}


def add(commands: argparse._SubParsersAction[Any]) -> None:
    """Add `quire gate`."""
    parser = commands.add_parser(
        "gate", help="judge a candidate by rules; exit code 0 promote, 3 not proven, 4 refuse"
    )
    parser.add_argument("name", help="the registered model")
    parser.add_argument("candidate", help="a version: 3, @alias, NAME/3 or newest")
    add_dataset_options(parser)
    parser.add_argument("--rules", type=Path, help="rules in TOML; default: data/gates/default.toml")
    parser.add_argument("--champion", help="compare with this version; default: @champion")
    parser.add_argument("--promote", action="store_true", help="make it the champion if it passes")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Judge, print, exit with the verdict's code."""
    spec = {
        "name": arguments.name, "candidate": arguments.candidate, "champion": arguments.champion,
        "dataset": absolute(arguments.dataset), "rules": absolute(arguments.rules), "promote": arguments.promote,
        "limit": arguments.limit, "seed": arguments.seed,
        "scorers": arguments.scorers, "max_tokens": arguments.max_tokens,
    }  # fmt: skip
    result = run_job("gate", spec, f"gate {arguments.name} {arguments.candidate}", arguments)
    text = as_text(result) + (f"\n{result['note']}" if result["note"] else "")
    print(text, file=sys.stderr if arguments.json else sys.stdout)
    if arguments.json:
        print(json.dumps(result))
    return EXIT_CODES[result["verdict"]]
