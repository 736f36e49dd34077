"""``python -m engine.bench NAME [options]``: runs one benchmark and ends with one line of JSON.

The modules of this package but `record` are benchmarks, named as they are, with ``-`` for ``_``; what they share is in ``parts``.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from types import ModuleType

import engine.bench
from engine.bench.record import RESULTS, make_record, save, to_json

NOT_BENCHMARKS = frozenset({"__main__", "record"})


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark that `argv` names; returns the exit code: 1 where a part of it failed."""
    arguments = sys.argv[1:] if argv is None else argv
    modules = pkgutil.iter_modules(engine.bench.__path__)
    names = sorted(m.name for m in modules if not m.ispkg and m.name not in NOT_BENCHMARKS)
    parser = argparse.ArgumentParser(prog="python -m engine.bench", description=__doc__)
    parser.add_argument(
        "name", choices=[name.replace("_", "-") for name in names], help="the benchmark to run"
    )
    chosen = parser.parse_args(arguments[:1]).name
    module = importlib.import_module(f"engine.bench.{chosen.replace('-', '_')}")
    figures = module.run(_options(chosen, module, arguments[1:]))
    record = make_record(chosen, figures)
    if _SAVE in arguments[1:]:
        print(f"saved to {save(record, RESULTS)}")
    print(to_json(record))
    return 1 if figures.get("failed") else 0


_SAVE = "--save"


def _options(name: str, module: ModuleType, arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m engine.bench {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(_SAVE, action="store_true", help=f"keep the record in {RESULTS}/")
    if hasattr(module, "add_arguments"):
        module.add_arguments(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
