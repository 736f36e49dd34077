"""``python -m workbench.bench NAME [options]``: runs one benchmark and ends with one line of JSON."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from engine.bench.record import make_record, save, to_json
from workbench.bench import live

BENCHMARKS = {"live": live}
RESULTS = Path("data/results")


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark that `argv` names; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m workbench.bench", description=__doc__)
    commands = parser.add_subparsers(dest="name", required=True)
    for name, module in BENCHMARKS.items():
        command = commands.add_parser(
            name, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.add_argument("--save", action="store_true", help=f"keep the record in {RESULTS}/")
        module.add_arguments(command)
    args = parser.parse_args(argv)
    record = make_record(args.name, BENCHMARKS[args.name].run(args))
    if args.save:
        print(f"saved to {save(record, RESULTS)}")
    print(to_json(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
