"""Every GPU benchmark in one run of at most 8 minutes, the most telling first; each one's record is saved as soon as it is done.

Needs torch, triton and transformers only, and xgrammar for what it is about. A benchmark whose time is not left is skipped with a line that says so; one that
fails is reported and the others go on. Peers are off unless --peer-seconds is given, and then have that time on top.
"""

from __future__ import annotations

import argparse
import importlib
import time
import traceback
from importlib.util import find_spec
from typing import Any

from engine.bench.parts.peers import add_arguments as add_peer_arguments
from engine.bench.parts.random_engine import free_memory
from engine.bench.parts.session import Session, open_session
from engine.bench.parts.workload import OutOfTime
from engine.bench.record import RESULTS, make_record, save

BUDGET_SECONDS = 8 * 60.0
# In order of value, each with the seconds that must be left for it to begin: room, not a prediction.
BENCHMARKS = {
    "serve-8b": 60.0, "nano": 30.0, "single": 20.0, "attention": 20.0, "prefill": 20.0, "mixed": 30.0,
    "invariant": 45.0, "adapters": 60.0, "structured": 40.0, "lifecycle": 90.0,
}  # fmt: skip
INTERPRETED = frozenset({"attention"})
NEEDS_XGRAMMAR = frozenset({"structured"})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_peer_arguments(parser)
    parser.set_defaults(seconds=BUDGET_SECONDS, peer_seconds=0.0)
    parser.add_argument(
        "--only", nargs="+", choices=list(BENCHMARKS), default=list(BENCHMARKS), metavar="NAME"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run them all; leaves the program with code 2 where there is no GPU. `failed` names those that did not run through."""
    began = time.monotonic()
    session = open_session(options)
    found: dict[str, Any] = {}
    for name in BENCHMARKS:
        if name in options.only:
            found[name] = _run_one(name, session, options)
    failed = [name for name, result in found.items() if "failed" in result]
    print(f"\nfailed: {', '.join(failed) or 'none'}")
    return {
        **session.figures(), "benchmarks": found, "failed": failed, "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip


def _run_one(name: str, session: Session, options: argparse.Namespace) -> dict[str, Any]:
    """Verdicts and time of one benchmark, or why there are none."""
    print(f"\n── {name} " + "─" * (100 - len(name)))
    if not session.has_room(name, 0.0 if session.is_tiny else BENCHMARKS[name]):
        return {"left_out": f"{session.left_s:.0f} s were left"}
    if session.device.type == "cpu" and name in INTERPRETED:
        print(f"{name}: left out, without a GPU it has Triton's interpreter in a process of its own")
        return {"left_out": "no GPU"}
    if name in NEEDS_XGRAMMAR and find_spec("xgrammar") is None:
        print(f"{name}: left out, xgrammar is not installed")
        return {"left_out": "no xgrammar"}
    began = time.monotonic()
    try:
        module = importlib.import_module(f"engine.bench.{name.replace('-', '_')}")
        figures = module.measure(session, _options_of(module, options))
    except OutOfTime:
        print(f"{name}: stopped, the budget ended while it ran")
        return {"left_out": "the budget ended while it ran"}
    except Exception as error:  # noqa: BLE001 - one benchmark's failure is reported, the others go on
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}"}
    finally:
        free_memory()
    if options.save:
        print(f"saved to {save(make_record(name, figures), RESULTS)}")
    return {"seconds": round(time.monotonic() - began, 1), "verdicts": figures["verdicts"]}


def _options_of(module: Any, options: argparse.Namespace) -> argparse.Namespace:
    """The benchmark's own defaults, under what this run was told."""
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return argparse.Namespace(**vars(parser.parse_args([])) | vars(options))
