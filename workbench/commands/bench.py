"""`quire bench run | list | compare`: load a server and keep the figures, look at earlier ones, compare two."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench import exit_codes
from workbench import settings as settings_module

if TYPE_CHECKING:
    from workbench.bench.run import Progress

_SPEC_FLAGS = (
    "url", "model", "requests", "concurrency", "rate", "input_tokens", "output_tokens", "seed", "dataset", "trace",
    "trace_speed", "warmup", "temperature", "timeout_s", "name",
)  # fmt: skip
_ROW = "{:<9}{:>10}{:>10}{:>10}{:>10}"


def add(commands: Any) -> None:
    """Add `quire bench` and its subcommands."""
    parser = commands.add_parser(
        "bench", help="measure a server under load; list and compare what was measured"
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    run = actions.add_parser("run", help="load a server and keep the figures")
    _add_run_options(run)
    run.set_defaults(run=_run)

    listed = actions.add_parser("list", help="saved benchmarks, newest first")
    listed.add_argument("--limit", type=int, default=20)
    _add_common(listed)
    listed.set_defaults(run=_list)

    compare = actions.add_parser("compare", help="ratios of two saved benchmarks, with intervals")
    compare.add_argument("first", help='id, its beginning, an MLflow run id, or "latest"')
    compare.add_argument("second")
    compare.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    _add_common(compare)
    compare.set_defaults(run=_compare)


def _add_run_options(run: argparse.ArgumentParser) -> None:
    run.add_argument(
        "--url",
        help="an OpenAI-compatible server; default: the app of this HOME_DIR, or an engine of our own",
    )
    run.add_argument("--model", help="default: the server's first; or endpoint:NAME/MODEL")
    run.add_argument("--requests", type=int, help="measured requests (default 32)")
    load = run.add_mutually_exclusive_group()
    load.add_argument("--concurrency", type=int, help="so many at a time (default 8)")
    load.add_argument("--rate", type=float, help="so many a second, by a Poisson process")
    run.add_argument("--input-tokens", type=int, help="prompt length (default 128)")
    run.add_argument("--output-tokens", type=int, help="answer length (default 64)")
    run.add_argument("--seed", type=int, help="of prompts and arrival times (default 0)")
    run.add_argument("--dataset", help="conversations: a JSONL file, or a name in data/datasets")
    run.add_argument(
        "--trace", help="recorded requests: a CSV file of arrival_s, input_tokens, output_tokens"
    )
    run.add_argument("--trace-speed", type=float, help="replay so many times faster (default 1)")
    run.add_argument("--warmup", type=int, help="requests before the measured ones")
    run.add_argument("--temperature", type=float, help="default 0")
    run.add_argument("--timeout-s", type=float, help="of one request (default 600)")
    for name in ("ttft", "tpot", "e2e"):
        run.add_argument(
            f"--slo-{name}-ms", type=float, help=f"objective for goodput: {name.upper()} at most"
        )
    run.add_argument("--name", help="title in lists and in MLflow")
    run.add_argument("--no-mlflow", action="store_true", help="keep it in HOME_DIR alone")
    _add_common(run)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--home-dir", type=Path, help="where everything is kept (HOME_DIR)")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")


def _run(arguments: argparse.Namespace) -> int:
    from workbench.bench import spec as spec_module
    from workbench.bench.job import result_of
    from workbench.bench.run import run_benchmark

    given = {name: getattr(arguments, name) for name in _SPEC_FLAGS if getattr(arguments, name) is not None}
    slo = {f"{name}_ms": getattr(arguments, f"slo_{name}_ms") for name in ("ttft", "tpot", "e2e")}
    spec = spec_module.parse({**given, "slo": slo})
    settings = settings_module.load(home_dir=arguments.home_dir)
    settings_module.prepare_home(settings)
    finished = run_benchmark(spec, settings, on_progress=_Teller(), track=not arguments.no_mlflow)
    result = result_of(finished)
    _print_report(result, sys.stderr if arguments.json else sys.stdout)
    if arguments.json:
        print(json.dumps(result), flush=True)
    if finished.record.cancelled:
        return exit_codes.INTERRUPTED
    return 0 if result["num_ok"] else exit_codes.FAILURE


def _list(arguments: argparse.Namespace) -> int:
    from workbench.bench import saved

    settings = settings_module.load(home_dir=arguments.home_dir)
    records = saved.listed(settings.home_dir, limit=arguments.limit)
    rows = [
        {
            "id": record.id,
            "at": record.at,
            "title": record.title,
            "model": record.target.get("model"),
            "cancelled": record.cancelled,
            **{
                name: record.figures[name]
                for name in ("num_requests", "output_tokens_per_s", "ttft_ms", "tpot_ms", "e2e_ms")
            },
        }
        for record in records
    ]
    if arguments.json:
        print(json.dumps({"benchmarks": rows}))
        return 0
    if not rows:
        print("No benchmarks yet: run `quire bench run`.")
    for row in rows:
        speed = _short(row["output_tokens_per_s"])
        print(
            f"{row['id']}  {row['at'][:16]}  {speed:>7} tokens/s  TTFT p95 {_short(row['ttft_ms']['p95'])} ms  {row['title']}"
        )
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from workbench.bench import saved
    from workbench.bench.compare import compare_benchmarks

    home_dir = settings_module.load(home_dir=arguments.home_dir).home_dir
    first, second = (saved.load(home_dir, name) for name in (arguments.first, arguments.second))
    compared = compare_benchmarks(first, second, seed=arguments.seed)
    if arguments.json:
        print(json.dumps(compared))
        return 0
    print(
        f"{compared['second']} against {compared['first']}, {'the same plan' if compared['paired'] else 'different plans'}"
    )
    for name, figure in compared["metrics"].items():
        print(
            f"{name:<22}{_short(figure['a']):>10}{_short(figure['b']):>10}   × {figure['ratio']:.3f} "
            f"[{figure['low']:.3f}, {figure['high']:.3f}]  {figure['verdict']}"
        )
    for name, (a, b) in compared["differences"].items():
        print(f"  {name}: {a} → {b}")
    return 0


class _Teller:
    """Progress on standard error: one line that is written over, or a line for each new message."""

    def __init__(self) -> None:
        self._last = ""

    def __call__(self, progress: Progress) -> None:
        if progress.message == self._last:
            return
        self._last = progress.message
        if sys.stderr.isatty():
            end = "\n" if progress.fraction >= 1 else ""
            print(
                f"\r\x1b[K{progress.fraction:>4.0%} {progress.message}", end=end, file=sys.stderr, flush=True
            )
        elif not progress.message[:1].isdigit():  # a log has no use for every request
            print(progress.message, file=sys.stderr, flush=True)


def _print_report(result: dict[str, Any], to: Any) -> None:
    print(f"\n{result['title']}: {result['target']['model']} at {result['target']['url']}", file=to)
    print(_ROW.format("ms", "mean", "p50", "p95", "p99"), file=to)
    for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"):
        values = [_short(result[name][key]) for key in ("mean", "p50", "p95", "p99")]
        print(_ROW.format(name.removesuffix("_ms").upper(), *values), file=to)
    print(
        f"{_short(result['output_tokens_per_s'])} output tokens/s, {_short(result['requests_per_s'])} requests/s, "
        f"{result['num_ok']} of {result['num_requests']} requests in {_short(result['duration_s'])} s",
        file=to,
    )
    for reason, count in result["errors"].items():
        print(f"failed {count} ×: {reason}", file=to)
    if result["goodput"]:
        print(
            f"goodput {_short(result['goodput']['requests_per_s'])} requests/s ({result['goodput']['share']:.0%})",
            file=to,
        )
    if result["share_of_limit"] is not None:
        bound = ((result["engine"] or {}).get("limit") or {}).get("bound_by")
        told = f", bound by {bound}" if bound else ""
        print(f"{result['share_of_limit']:.1%} of this machine's limit{told}", file=to)
    for note in result["notes"]:
        print(note, file=to)
    where = (result["mlflow"] or {}).get("path")
    print(f"saved as {result['id']}{f', MLflow {where}' if where else ''}", file=to)


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
